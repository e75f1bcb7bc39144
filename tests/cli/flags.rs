//! Flags, variables and files: what is wrong with them is said in one sentence.

use std::net::TcpListener;

use crate::fake::no_control_server;
use crate::program::{KEY, Program};

fn run(words: &str) -> Program {
    Program::new(&format!("run -o json {words}"))
}

/// A run that has a key and would only fail at its control server.
fn keyed(words: &str) -> Program {
    let server = no_control_server();
    run(&format!("--login-server http://{server} {words}")).env("TS_AUTHKEY", KEY)
}

#[test]
fn an_unknown_flag_suggests_the_nearest() {
    let json = run("--hold-timout 3s").run().refused(64, "TC-2009");
    assert!(json["cause"].as_str().unwrap().contains("--hold-timeout"), "{json}");
}

#[test]
fn bad_values_name_their_flag() {
    for (words, flag) in [
        ("--join-timeout soon", "--join-timeout"),
        ("--listen here", "--listen"),
        ("--transport pigeon", "--transport"),
        ("--hostname a.b", "--hostname"),
        ("--advertise-tags browser", "--advertise-tags"),
        ("--direct-allow host:80", "--direct-allow"),
        ("--direct-allow 0.0.0.0/0", "--direct-allow"),
        ("--max-connections 0", "--max-connections"),
        ("--login-server headscale.example", "--login-server"),
        ("--login-server ftp://headscale.example", "--login-server"),
        ("--log-level a=b=c", "--log-level"),
        ("--proxy socks5://a:1", "--proxy"),
        ("--accept-routes=perhaps", "--accept-routes"),
        ("--metadata nothing", "--metadata"),
    ] {
        let json = run(words).run().refused(64, "TC-2009");
        assert!(json["cause"].as_str().unwrap().contains(flag), "{json}");
    }
}

#[test]
fn a_password_in_a_url_is_not_repeated() {
    run("--proxy ftp://me:geheimgeheimgeheim@proxy:1").run().refused(64, "TC-2009");
    run("--login-server https://me:geheimgeheimgeheim@control").run().refused(64, "TC-2009");
}

#[test]
fn plain_http_to_a_public_name_is_refused() {
    let program = run("--login-server http://headscale.example").env("TS_AUTHKEY", KEY);
    program.run().refused(64, "TC-1109");
}

#[test]
fn a_port_that_is_taken_comes_before_everything_else() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let words = format!("--listen {} --auth-key file:/nowhere", listener.local_addr().unwrap());
    let json = run(&words).run().refused(71, "TC-2004");
    assert!(json["cause"].as_str().unwrap().contains("taken"), "{json}");
}

#[test]
fn an_address_that_is_not_local_is_told() {
    let json = keyed("--listen 192.0.2.1:0 --allow-non-loopback").run().refused(71, "TC-2004");
    assert!(json["cause"].as_str().unwrap().contains("no such address"), "{json}");
}

#[test]
fn other_machines_are_not_served_by_accident() {
    let json = keyed("--listen 0.0.0.0:0").run().refused(64, "TC-2009");
    assert!(json["cause"].as_str().unwrap().contains("--allow-non-loopback"), "{json}");
}

#[test]
fn files_that_cannot_be_written_are_told_before_the_key_is_spent() {
    for flag in ["--ready-file", "--status-file", "--pidfile"] {
        keyed(&format!("{flag} /nowhere/file")).run().refused(73, "TC-2005");
    }
}

#[test]
fn files_that_a_setting_names_must_be_there() {
    keyed("--ca-file /nowhere/ca.pem").run().refused(66, "TC-2012");
    let folder = tempfile::tempdir().unwrap();
    keyed(&format!("--ca-file {}", folder.path().display())).run().refused(66, "TC-2012");
    for (text, words) in [
        ("ssh-rsa AAAA", "holds no certificate"),
        ("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", "holds what is not a certificate"),
    ] {
        let path = folder.path().join("ca.pem");
        std::fs::write(&path, text).unwrap();
        let json = keyed(&format!("--ca-file {}", path.display())).run().refused(65, "TC-2017");
        assert!(json["cause"].as_str().unwrap().contains(words), "{json}");
        assert!(json["remedy"].as_str().unwrap().contains("PEM"), "{json}");
    }
    keyed("--proxy-auth file:/nowhere/auth").run().refused(66, "TC-2012");
    keyed("--proxy-auth file:/dev/null").run().refused(65, "TC-2011");
}

#[test]
fn a_bad_variable_is_named() {
    let json = run("").env("TS_SOCKS5_SERVER", "here").run().refused(65, "TC-2011");
    assert!(json["cause"].as_str().unwrap().starts_with("TS_SOCKS5_SERVER: "), "{json}");
    let json = run("").env("TS_EXTRA_ARGS", "--accept-routes --ssh").run().refused(64, "TC-2009");
    assert!(json["cause"].as_str().unwrap().starts_with("TS_EXTRA_ARGS: "), "{json}");
}

#[test]
fn a_misspelt_variable_is_warned_about() {
    let ended = keyed("").env("TS_HOSTNAM", "x").run();
    assert!(ended.stderr.contains("TS_HOSTNAM is not known; is TS_HOSTNAME meant?"), "{}", ended.stderr);
}

#[test]
fn json_logs_are_json_to_the_last_line() {
    let ended = keyed("--log-format json --log-level debug --run-id r7").run();
    assert_eq!(ended.code(), 76);
    assert!(!ended.stderr.is_empty());
    for line in ended.stderr.lines() {
        let line: serde_json::Value = serde_json::from_str(line).unwrap_or_else(|_| panic!("no JSON: {line}"));
        assert!(line["ts"].is_string() && line["level"].is_string() && line["run_id"] == "r7", "{line}");
    }
    let failed = ended.stderr.lines().find(|line| line.contains("\"event\":\"failed\"")).unwrap();
    assert!(failed.contains("\"code\":\"TC-1105\""), "{failed}");
}

#[test]
fn help_version_completions_and_manual_go_to_standard_output() {
    for (words, expected) in [
        ("--help", "Examples:"),
        ("run --help", "--auth-key"),
        ("exec --help", "-- <CMD>"),
        ("--version", "tailcar "),
        ("completions bash", "_tailcar()"),
        ("completions zsh", "#compdef tailcar"),
        ("man", ".TH tailcar"),
        ("man run", "\\-\\-listen"),
    ] {
        let ended = Program::new(words).run();
        assert_eq!((ended.code(), ended.stderr.as_str()), (0, ""), "{words}");
        assert!(ended.stdout.contains(expected), "{words}: {}", ended.stdout);
        assert!(!ended.stdout.contains("__child"), "{words}");
    }
    assert_eq!(Program::new("").run().code(), 64);
}

#[test]
fn help_names_only_exit_codes_that_a_run_has() {
    let help = Program::new("run --help").run().stdout;
    let (_, codes) = help.split_once("Exit codes:").unwrap();
    let (codes, _) = codes.split_once("Every failure").unwrap();
    let ours = ["0 done", "64-66", "70", "71", "73", "74", "75", "76", "77", "78", "80", "125-127"];
    let signals = ["128+n", "129", "130", "131", "143"];
    for code in ours.iter().chain(&signals) {
        assert!(codes.contains(code), "{code}: {codes}");
    }
    // 68 and 69 are for checks of targets.
    let known: Vec<_> = ours.iter().chain(&signals).flat_map(|code| code.split(['-', ' ', '+'])).collect();
    for code in codes.split(|other: char| !other.is_ascii_digit()).filter(|code| !code.is_empty()) {
        assert!(known.contains(&code), "{code}: {codes}");
    }
}

#[test]
fn a_proxy_password_and_a_command_do_not_go_together() {
    let words = "exec -o json --proxy-auth file:/dev/null -- true";
    let json = Program::new(words).env("TS_AUTHKEY", KEY).run().refused(64, "TC-2009");
    assert!(json["cause"].as_str().unwrap().contains("--proxy-auth"), "{json}");
}

#[test]
fn a_reader_that_goes_away_is_no_failure() {
    let mut running = Program::new("run --help").start();
    drop(running.child.stdout.take());
    drop(running.child.stderr.take());
    assert_eq!(running.end().code(), 0);
}
