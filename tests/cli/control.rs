//! Control servers that are not there, or not what they should be.

use std::io::{Read, Write};
use std::net::SocketAddr;
use std::thread;
use std::time::Duration;

use crate::fake;
use crate::program::{Ended, KEY, Program};

/// Joins at `url` and fails there, within its three seconds and some slack.
fn join(url: &str, words: &str) -> Ended {
    let ended = Program::new(&format!("run -o json --join-timeout 3s --login-server {url} {words}"))
        .env("TS_AUTHKEY", KEY)
        .run();
    assert!(ended.took < Duration::from_secs(8), "took {:?}", ended.took);
    ended
}

fn plain(address: SocketAddr) -> Ended {
    join(&format!("http://{address}"), "")
}

#[test]
fn a_name_without_address_is_told() {
    join(&format!("https://{}", fake::NO_HOST), "").refused(75, "TC-1101");
}

#[test]
fn a_closed_port_is_told() {
    plain(fake::closed_port()).refused(75, "TC-1102");
}

#[test]
fn silence_is_told_at_the_limit() {
    let server = fake::serve(|mut stream| {
        // Reads until the client gives up.
        let _ = stream.read_to_end(&mut Vec::new());
    });
    let ended = plain(server);
    ended.refused(75, "TC-1103");
}

#[test]
fn a_certificate_that_nobody_trusts_is_told_and_one_that_is_named_is_taken() {
    let folder = tempfile::tempdir().unwrap();
    let ca = folder.path().join("ca.pem");
    let url = format!("https://localhost:{}", fake::tls(Some(&ca)).port());
    join(&url, "").refused(76, "TC-1104");
    // With its certificate, what is wrong is what it answers.
    join(&url, &format!("--ca-file {}", ca.display())).refused(76, "TC-1105");
}

#[test]
fn what_answers_without_being_a_control_server_is_told() {
    plain(fake::no_control_server()).refused(76, "TC-1105");
    plain(fake::page("200 OK", "text/html", "<html>please log in</html>")).refused(76, "TC-1105");
    plain(fake::page("200 OK", "application/json", "{}")).refused(76, "TC-1105");
    plain(fake::serve(|mut stream| drop(stream.write_all(b"SSH-2.0-OpenSSH_9.9\r\n")))).refused(76, "TC-1105");
}

#[test]
fn a_server_error_is_told_as_one() {
    plain(fake::page("500 Internal Server Error", "text/plain", "oops")).refused(75, "TC-1106");
}

#[test]
fn a_session_that_is_cut_in_its_handshake_is_told() {
    let json = plain(fake::upgraded(|stream| {
        let _ = stream.write_all(&[2, 0, 51, 9, 9]);
    }))
    .refused(76, "TC-1107");
    assert_eq!(json["stage"], "control");
}

#[test]
fn an_oversize_frame_in_the_handshake_is_told() {
    plain(fake::upgraded(|stream| {
        // Type 2 (response) and the greatest length that its field can say.
        let _ = stream.write_all(&[2, 0xff, 0xff]).and_then(|()| stream.write_all(&[0; 4096]));
        thread::sleep(Duration::from_millis(200));
    }))
    .refused(76, "TC-1107");
}

#[test]
fn garbage_in_the_handshake_is_told() {
    plain(fake::upgraded(|stream| {
        let mut frame = vec![2, 0, 48];
        frame.extend([0x5a; 48]);
        let _ = stream.write_all(&frame);
        thread::sleep(Duration::from_millis(200));
    }))
    .refused(76, "TC-1107");
}

#[test]
fn a_corporate_proxy_that_refuses_is_told() {
    let proxy = fake::page("407 Proxy Authentication Required", "text/plain", "who are you");
    let words = format!("--proxy http://me:geheimgeheimgeheim@{proxy}");
    join("https://control.invalid", &words).refused(75, "TC-1302");
}
