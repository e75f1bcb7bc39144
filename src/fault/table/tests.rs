//! What holds for every row: codes, sentences, exit statuses, and the answers that are documented.

use super::*;

#[test]
fn codes_are_unique_rising_and_grouped_by_stage() {
    assert!(ALL.windows(2).all(|pair| pair[0].code < pair[1].code), "codes rise, so none is there twice");
    for row in ALL {
        assert_eq!(row.code / 100, row.stage.family(), "TC-{}", row.code);
    }
}

#[test]
fn sentences_are_short_lower_case_and_without_period() {
    for row in ALL {
        for text in [row.cause, row.remedy] {
            assert!((10..=130).contains(&text.len()), "{text}");
            assert!(!text.ends_with(['.', '!', ' ']) && !text.starts_with(' '), "{text}");
        }
        let first = row.cause.split(' ').next().unwrap();
        let name = first.chars().nth(1).is_some_and(char::is_uppercase);
        assert!(name || first.starts_with(char::is_lowercase), "{}", row.cause);
    }
}

#[test]
fn exit_statuses_are_those_that_are_documented() {
    let known = [0, 64, 65, 66, 68, 69, 70, 71, 73, 74, 75, 76, 77, 78, 80, 126, 127];
    for row in ALL {
        assert!(known.contains(&row.exit), "TC-{} exits {}", row.code, row.exit);
        let wrong = (row.exit == 75 && !row.retryable) || (matches!(row.exit, 64..=66 | 76..=78) && row.retryable);
        assert!(!wrong || row.code == HEAD_TIMEOUT.code, "TC-{}: exit and retryable disagree", row.code);
    }
}

/// The table of the proxy's documentation: families, SOCKS reply, HTTP status, `Proxy-Status` error.
const DOCUMENTED: &[(&[u16], u8, u16, &str)] = &[
    (&[10, 11, 12, 13, 20], 1, 503, "destination_unavailable"),
    (&[19], 2, 403, "http_request_denied"),
    (&[14], 4, 502, "dns_error"),
    (&[14], 4, 504, "dns_timeout"),
    (&[15, 17], 3, 502, "destination_ip_unroutable"),
    (&[16], 4, 504, "connection_timeout"),
    (&[16, 17], 6, 504, "connection_timeout"),
    (&[16], 2, 502, "destination_ip_prohibited"),
    (&[17], 5, 502, "connection_refused"),
    (&[17], 1, 502, "connection_terminated"),
    (&[17, 19], 1, 503, "connection_limit_reached"),
    (&[18], 1, 502, "http_protocol_error"),
    (&[19], 7, 501, "http_request_error"),
    (&[19], 7, 405, "http_request_error"),
    (&[19], 8, 400, "http_request_error"),
    (&[19], 1, 400, "http_request_error"),
    (&[19], 1, 431, "http_request_error"),
    (&[19], 1, 408, "http_request_error"),
    (&[19], 0xff, 407, ""),
    (&[19], 2, 502, "proxy_loop_detected"),
    (&[20], 1, 500, "proxy_internal_error"),
];

#[test]
fn proxy_answers_are_those_that_are_documented() {
    for row in ALL {
        let answer = (row.socks, row.http, row.proxy_status);
        let found = DOCUMENTED.iter().any(|(families, socks, http, status)| {
            families.contains(&row.stage.family()) && answer == (*socks, *http, *status)
        });
        assert!(found, "TC-{}: {answer:?}", row.code);
    }
    for (_, socks, http, status) in DOCUMENTED {
        assert!(ALL.iter().any(|row| (row.socks, row.http, row.proxy_status) == (*socks, *http, *status)), "{status}");
    }
}
