//! Keys that are made first: by an OAuth client, and for a workload's identity.

use std::time::Duration;

use serde_json::{Value, json};

use crate::api::{self, Api, CLIENT, FEDERATED, Fault, MINTED, TOKEN};
use crate::fake::{NO_HOST, answer, closed_port, read_head, serve, tls};
use crate::program::{Ended, Program, await_some};

const MADE: [&str; 2] = ["POST /api/v2/oauth/token", "POST /api/v2/tailnet/-/keys"];
const EXCHANGED: [&str; 2] = ["POST /api/v2/oauth/token-exchange", "POST /api/v2/tailnet/-/keys"];

/// A client's secret that knows where its API is.
fn secret(api: &Api, more: &str) -> String {
    format!("{CLIENT}?baseURL={}{more}", api.url())
}

fn run(words: &str) -> Program {
    Program::new(&format!("run -o json --join-timeout 3s --log-level info {words}"))
}

/// A run whose control server is nobody: what happens is the making of the key.
fn keyed(api: &Api, more: &str) -> Program {
    let server = format!("--login-server http://{} --advertise-tags tag:browser", closed_port());
    run(&server).env("TS_AUTHKEY", &secret(api, more))
}

/// A workload whose login server is the API's.
fn workload(api: &Api, words: &str) -> Program {
    run(&format!("--login-server {} --advertise-tags tag:browser {words}", api.url()))
}

fn create(api: &Api) -> Value {
    let seen = api.seen();
    let made = seen.iter().find(|seen| seen.line.ends_with("/keys")).unwrap();
    made.body["capabilities"]["devices"]["create"].clone()
}

#[test]
fn a_client_secret_makes_a_key_while_control_is_dialled_and_takes_it_back_unused() {
    let api = Api::start(MINTED);
    let ended = keyed(&api, "").run();
    // What ends the run is the control server that is not there.
    ended.refused(75, "TC-1102");
    assert!(ended.stderr.contains("minted an auth key"), "{}", ended.stderr);
    assert!(ended.stderr.contains("took the unused auth key back"), "{}", ended.stderr);
    let wanted: Vec<_> = MADE.into_iter().chain(["DELETE /api/v2/tailnet/-/keys/kMINTED"]).collect();
    assert_eq!(api.lines(), wanted);
    let wanted = json!({"reusable": false, "ephemeral": true, "preauthorized": false, "tags": ["tag:browser"]});
    assert_eq!(create(&api), wanted);
}

#[test]
fn attributes_are_asked_for() {
    let api = Api::start(MINTED);
    keyed(&api, "&ephemeral=false&preauthorized=true").run().refused(75, "TC-1102");
    let wanted = json!({"reusable": false, "ephemeral": false, "preauthorized": true, "tags": ["tag:browser"]});
    assert_eq!(create(&api), wanted);
}

#[test]
fn every_source_of_a_client_secret_is_taken() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("secret").display().to_string();
    let server = format!("--login-server http://{} --advertise-tags tag:browser", closed_port());
    let sources: [fn(&str, Program) -> Program; 3] = [
        |secret, program| program.env("TS_CLIENT_SECRET", secret),
        |secret, program| program.env("TS_CLIENT_SECRET", secret).env("TS_CLIENT_ID", "kCLIENT1CNTRL"),
        |secret, program| program.arg("--auth-key").arg("-").stdin(&format!("{secret}\n")),
    ];
    for source in sources {
        let api = Api::start(MINTED);
        source(&secret(&api, ""), run(&server)).run().refused(75, "TC-1102");
        assert_eq!(api.lines()[..2], MADE);
    }
    let api = Api::start(MINTED);
    std::fs::write(&file, secret(&api, "")).unwrap();
    run(&format!("{server} --auth-key file:{file}")).run().refused(75, "TC-1102");
    assert_eq!(api.lines()[..2], MADE);
}

#[test]
fn secrets_are_gone_from_the_environment_while_we_run() {
    let folder = tempfile::tempdir().unwrap();
    let pidfile = folder.path().join("pid");
    let server = format!("--login-server http://{} --advertise-tags tag:browser --pidfile", closed_port());
    let api = Api::start(MINTED);
    let running = Program::new(&format!("run {server}"))
        .arg(&pidfile)
        .env("TS_CLIENT_SECRET", &secret(&api, ""))
        .env("TS_ID_TOKEN", TOKEN)
        .env("TS_CLIENT_ID", FEDERATED)
        .start();
    await_some("the pid file", || pidfile.exists().then_some(()));
    let environ = std::fs::read(format!("/proc/{}/environ", running.child.id())).unwrap();
    let environ = String::from_utf8_lossy(&environ);
    assert!(!environ.contains("geheim") && !environ.contains("TS_ID_TOKEN"), "{environ}");
    running.signal("TERM");
    assert_eq!(running.end().code(), 0);
}

#[test]
fn without_tags_no_key_is_made() {
    let api = Api::start(MINTED);
    let server = format!("--login-server http://{}", closed_port());
    run(&server).env("TS_AUTHKEY", &secret(&api, "")).run().refused(64, "TC-1012");
    let words = format!("--login-server {} --client-id {FEDERATED}", api.url());
    run(&words).env("TS_ID_TOKEN", TOKEN).run().refused(64, "TC-1012");
    assert_eq!(api.lines(), Vec::<String>::new());
}

#[test]
fn wrong_attributes_are_told_before_anything_is_sent() {
    let wrong = |more: &str| run("").env("TS_AUTHKEY", &format!("{CLIENT}?{more}")).run().refused(65, "TC-1015");
    for (more, word) in [
        ("ephemral=true", "ephemral"),
        ("preauthorized=perhaps", "preauthorized"),
        ("baseURL=http://api.example.com", "plain HTTP"),
        ("baseURL=api.example.com", "not a URL"),
    ] {
        let json = wrong(more);
        assert!(json["cause"].as_str().unwrap().contains(word), "{json}");
    }
    let json = run("--client-id kFED?ephemral=1").run().refused(64, "TC-2009");
    assert!(json["cause"].as_str().unwrap().contains("ephemral"), "{json}");
}

#[test]
fn a_refusal_is_told_in_the_apis_own_words() {
    let api = Api::start(MINTED);
    let wrong = secret(&api, "").replace("-geheim", "-other-geheim");
    let server = format!("--login-server http://{} --advertise-tags tag:browser", closed_port());
    let json = run(&server).env("TS_AUTHKEY", &wrong).run().refused(77, "TC-1009");
    assert!(json["cause"].as_str().unwrap().contains("(401): API token invalid: [redacted]"), "{json}");
    let server = server.replace("tag:browser", "tag:other");
    let json = run(&server).env("TS_AUTHKEY", &secret(&api, "")).run().refused(77, "TC-1013");
    assert!(json["cause"].as_str().unwrap().contains("not permitted"), "{json}");
}

/// A run against an API with something wrong at `path`.
fn faulty(path: &'static str, times: usize, answer: fn(&mut std::net::TcpStream)) -> (Api, Ended) {
    let api = Api::faulty(MINTED, Some(Fault { path, times, answer }));
    let ended = keyed(&api, "").run();
    assert!(ended.took < Duration::from_secs(9), "took {:?}", ended.took);
    (api, ended)
}

const TOKEN_PATH: &str = "/api/v2/oauth/token";
const KEYS_PATH: &str = "/api/v2/tailnet/-/keys";

#[test]
fn what_passes_is_tried_again() {
    for (path, answer) in [(KEYS_PATH, api::limited as fn(&mut _)), (TOKEN_PATH, api::bad_gateway)] {
        let (api, ended) = faulty(path, 1, answer);
        ended.refused(75, "TC-1102");
        assert!(ended.stderr.contains("minted an auth key"), "{}", ended.stderr);
        assert_eq!(api.lines().iter().filter(|line| line.ends_with(path)).count(), 2);
    }
}

#[test]
fn a_key_whose_answer_is_lost_is_made_once_more_and_not_again() {
    let (api, ended) = faulty(KEYS_PATH, usize::MAX, api::bad_gateway);
    ended.refused(75, "TC-1010");
    assert_eq!(api.lines(), [MADE[0], MADE[1], MADE[1]]);
    // What was limited made nothing.
    let (api, ended) = faulty(KEYS_PATH, 2, api::limited);
    assert!(ended.stderr.contains("minted an auth key"), "{}", ended.stderr);
    assert_eq!(api.lines()[..4], [MADE[0], MADE[1], MADE[1], MADE[1]]);
}

#[test]
fn what_does_not_pass_is_told() {
    for (answer, words) in [
        (api::bad_gateway as fn(&mut _), "502 Bad Gateway"),
        (api::silent, "did not answer"),
        (api::limited_for_an_hour, "asks to wait 1h"),
        (api::limited_for_ever, "asks to wait 24h"),
    ] {
        let json = faulty(TOKEN_PATH, usize::MAX, answer).1.refused(75, "TC-1010");
        assert!(json["cause"].as_str().unwrap().contains(words), "{json}");
    }
    let server = "--login-server http://127.0.0.1:1 --advertise-tags tag:browser";
    let nobody = format!("{CLIENT}?baseURL=http://{}", closed_port());
    run(server).env("TS_AUTHKEY", &nobody).run().refused(75, "TC-1010");
}

#[test]
fn what_is_not_the_api_is_told_and_gets_nothing_twice() {
    for (answer, words) in [
        (api::portal as fn(&mut _), "not the JSON"),
        (api::endless, "more than 65536 octets"),
        (api::moved, "307 Temporary Redirect and points to 127.0.0.1:9"),
    ] {
        for path in [TOKEN_PATH, KEYS_PATH] {
            let (api, ended) = faulty(path, usize::MAX, answer);
            let json = ended.refused(76, "TC-1014");
            assert!(json["cause"].as_str().unwrap().contains(words), "{json}");
            assert_eq!(api.lines().iter().filter(|line| line.ends_with(path)).count(), 1);
        }
    }
    let api = Api::start("not a key");
    keyed(&api, "").run().refused(76, "TC-1014");
}

#[test]
fn a_certificate_that_nobody_trusts_gets_no_secret() {
    let folder = tempfile::tempdir().unwrap();
    let ca = folder.path().join("ca.pem");
    let base = format!("{CLIENT}?baseURL=https://localhost:{}", tls(Some(&ca)).port());
    let server = format!("--login-server http://{} --advertise-tags tag:browser", closed_port());
    let json = run(&server).env("TS_AUTHKEY", &base).run().refused(76, "TC-1014");
    assert!(json["cause"].as_str().unwrap().contains("TLS failed"), "{json}");
    // With its certificate, what is wrong is what it answers.
    let json = run(&format!("{server} --ca-file {}", ca.display())).env("TS_AUTHKEY", &base).run();
    let json = json.refused(76, "TC-1014");
    assert!(json["cause"].as_str().unwrap().contains("404"), "{json}");
}

#[test]
fn the_api_is_reached_through_the_corporate_proxy() {
    let (sender, heads) = std::sync::mpsc::channel();
    let proxy = serve(move |mut stream| {
        let _ = sender.send(read_head(&mut stream));
        answer(&mut stream, "407 Proxy Authentication Required", "text/plain", "who are you");
    });
    let words = format!("--login-server http://{} --advertise-tags tag:browser", closed_port());
    let words = format!("{words} --proxy http://me:geheimgeheimgeheim@{proxy}");
    let base = format!("{CLIENT}?baseURL=https://{NO_HOST}");
    run(&words).env("TS_AUTHKEY", &base).run().refused(75, "TC-1010");
    let all: Vec<String> = heads.try_iter().collect();
    let head = all.first().unwrap().to_ascii_lowercase();
    assert!(head.starts_with(&format!("connect {NO_HOST}:443 ")), "{head}");
    assert!(head.contains("proxy-authorization: basic "), "{head}");
    // Named as an exception, it is looked up by this machine itself.
    let ended = run(&format!("{words} --no-proxy {NO_HOST}")).env("TS_AUTHKEY", &base).run();
    ended.refused(75, "TC-1010");
    assert_eq!(heads.try_recv().ok(), None, "the proxy was asked");
}

#[test]
fn a_secret_over_plain_http_is_shown_to_no_proxy() {
    let (sender, heads) = std::sync::mpsc::channel();
    let proxy = serve(move |mut stream| drop(sender.send(read_head(&mut stream))));
    let api = Api::start(MINTED);
    let words = format!("--login-server http://{} --advertise-tags tag:browser", closed_port());
    // Loopback in a form that is no exception from the proxy.
    let base = format!("{CLIENT}?baseURL=http://[::ffff:127.0.0.1]:{}", api.address.port());
    run(&format!("{words} --proxy http://{proxy}")).env("TS_AUTHKEY", &base).run().refused(75, "TC-1102");
    assert_eq!(heads.try_recv().ok(), None, "the proxy was shown the secret");
    assert_eq!(api.lines()[..2], MADE);
}

#[test]
fn an_id_token_is_exchanged_at_the_login_server() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("token");
    std::fs::write(&file, format!("{TOKEN}\n")).unwrap();
    let words = format!("--client-id {FEDERATED}?preauthorized=true --id-token file:{}", file.display());
    for given in [true, false] {
        let api = Api::start(MINTED);
        let program = match given {
            true => workload(&api, &words),
            false => workload(&api, &format!("--client-id {FEDERATED}")).env("TS_ID_TOKEN", TOKEN),
        };
        // The login server is silent but for its API, so that is what fails in the end.
        program.run().refused(75, "TC-1103");
        assert_eq!(api.lines()[..2], EXCHANGED);
        let wanted = json!({"reusable": false, "ephemeral": true, "preauthorized": given, "tags": ["tag:browser"]});
        assert_eq!(create(&api), wanted);
    }
}

#[test]
fn a_github_job_is_asked_who_it_is() {
    let job = |api: &Api, words: &str| {
        let program = workload(api, words).env("TS_CLIENT_ID", FEDERATED);
        api.github().iter().fold(program, |program, (name, value)| program.env(name, value))
    };
    let api = Api::start(MINTED);
    job(&api, "--audience api.tailscale.com/kFED1CNTRL").run().refused(75, "TC-1103");
    assert_eq!(api.lines()[..3], ["GET /oidc", EXCHANGED[0], EXCHANGED[1]]);
    let api = Api::start(MINTED);
    let program =
        job(&api, "").env("TS_AUDIENCE", "another").env("ACTIONS_ID_TOKEN_REQUEST_TOKEN", "other-geheimgeheimgeheim");
    let json = program.run().refused(77, "TC-1011");
    assert!(json["cause"].as_str().unwrap().starts_with("GitHub Actions gave no ID token (401)"), "{json}");
}

#[test]
fn an_identity_without_a_token_is_told_the_ways_to_one() {
    let json = run("--client-id kFED --audience a").run().refused(64, "TC-1016");
    let remedy = json["remedy"].as_str().unwrap();
    assert!(["--id-token file:PATH", "TS_ID_TOKEN", "GitHub"].iter().all(|way| remedy.contains(way)), "{json}");
    run("--client-id kFED").run().refused(64, "TC-1016");
    run("--audience a").run().refused(64, "TC-2009");
    run("--client-id kFED --auth-key -").run().refused(64, "TC-2009");
    run("--client-id kFED --id-token file:/nowhere/token").run().refused(66, "TC-1005");
    run("--client-id kFED").env("TS_ID_TOKEN", "geheimgeheimgeheim").run().refused(65, "TC-1017");
    // Its beginning would have the right form.
    let long = format!("{TOKEN}{}", "x".repeat(15 << 10));
    run("--client-id kFED").env("TS_ID_TOKEN", &long).run().refused(65, "TC-1017");
    run("").env("TS_CLIENT_ID", CLIENT).env("TS_ID_TOKEN", TOKEN).run().refused(65, "TC-1004");
    run(&format!("--client-id kFED --id-token {TOKEN}")).run().refused(64, "TC-1007");
    run(&format!("--client-id kFED --id-tokn={TOKEN}")).run().refused(64, "TC-2009");
}

#[test]
fn a_token_that_is_refused_is_told() {
    let other = "eyJhbGciOiJFUzI1NiJ9.eyJzdWIiOiJvIn0.geheimgeheimgeheim";
    let api = Api::start(MINTED);
    let json = workload(&api, &format!("--client-id {FEDERATED}")).env("TS_ID_TOKEN", other).run();
    let json = json.refused(77, "TC-1011");
    assert!(json["cause"].as_str().unwrap().contains("(403): subject does not match: [redacted]"), "{json}");
}
