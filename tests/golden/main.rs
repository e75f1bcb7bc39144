//! Netmaps that Tailscale's own control plane sent, read as ours: the captures that come with the headscale module.
//!
//! They are read in place, from Go's module cache, and never copied. Each becomes the message that made it, goes
//! through the parser and the session, and what comes out is held to plain models of the raw JSON. Control's packet
//! filters are in the captures too, but there is nothing to hold to them: inbound is closed, so nothing here reads
//! them. Without Go or without the module nothing runs, and the summary says so; with `CI=true` that is a failure.

#![expect(clippy::unwrap_used, reason = "a test says what it expects by failing")]

mod capture;
mod names;
mod nodes;
mod routes;

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::{env, fs};

use libtest_mimic::{Arguments, Failed, Trial};

use capture::Capture;
use tailcar::netmap::session::Session;

/// Which module brings the captures, and where in it they are.
const MODULE: &str = "github.com/juanfont/headscale";
const FOLDER: &str = "hscontrol/policy/v2/testdata";

/// Every folder of captures: its name, and the files, netmaps and peers in it. The module's version is pinned, so
/// another number means that something was not read.
const FOLDERS: [(&str, Counts); 8] = [
    ("grant_results", Counts { files: 266, netmaps: 3885, peers: 18894 }),
    ("ssh_results", Counts { files: 108, netmaps: 1620, peers: 22680 }),
    ("acl_results", Counts { files: 215, netmaps: 1719, peers: 3375 }),
    ("routes_results", Counts { files: 125, netmaps: 1500, peers: 6644 }),
    ("sshtest_results", Counts { files: 37, netmaps: 555, peers: 7146 }),
    ("policytest_results", Counts { files: 57, netmaps: 459, peers: 2677 }),
    ("nodeattrs_results", Counts { files: 56, netmaps: 445, peers: 3009 }),
    ("issue_3212", Counts { files: 2, netmaps: 23, peers: 46 }),
];

/// All files of all folders.
const FILES: usize = 866;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Counts {
    files: usize,
    netmaps: usize,
    peers: usize,
}

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let folder = match folder() {
        Ok(folder) => folder,
        Err(why) => {
            drop(writeln!(std::io::stderr(), "SKIP golden: {why}"));
            let strict = env::var_os("CI").is_some_and(|value| value == "true");
            return if strict { ExitCode::FAILURE } else { ExitCode::SUCCESS };
        }
    };
    let mut trials = vec![{
        let folder = folder.clone();
        Trial::test("every_folder_of_captures_is_among_those_that_are_read", move || nothing_is_left_out(&folder))
    }];
    trials.extend(FOLDERS.into_iter().map(|(name, expected)| {
        let folder = folder.join(name);
        Trial::test(format!("netmaps_of_{name}_are_read_as_they_are"), move || agree(&folder, expected))
    }));
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// Where the captures are on this machine. Nothing is downloaded.
fn folder() -> Result<PathBuf, String> {
    let peers = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/interop/peers");
    let inherited = env::var_os("PATH").unwrap_or_default();
    let path = env::join_paths(env::split_paths(&inherited).chain([PathBuf::from("/usr/local/go/bin")]));
    let listed = Command::new("go")
        .args(["list", "-m", "-f", "{{.Dir}}", MODULE])
        .current_dir(peers)
        .env("PATH", path.unwrap_or(inherited))
        .envs([("GOFLAGS", "-mod=readonly"), ("GOTOOLCHAIN", "local"), ("GOPROXY", "off"), ("GOWORK", "off")])
        .output()
        .map_err(|error| format!("Go cannot be asked for {MODULE}: {error}"))?;
    let module = String::from_utf8_lossy(&listed.stdout).trim().to_owned();
    if !listed.status.success() || module.is_empty() {
        return Err(format!("{MODULE} is not in Go's module cache; tests/run fetches it"));
    }
    let folder = Path::new(&module).join(FOLDER);
    if folder.is_dir() { Ok(folder) } else { Err(format!("{FOLDER} is not in {module}")) }
}

fn nothing_is_left_out(folder: &Path) -> Result<(), Failed> {
    let mut found: Vec<_> = fs::read_dir(folder)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| capture::files(path).is_ok_and(|files| !files.is_empty()))
        .filter_map(|path| Some(path.file_name()?.to_string_lossy().into_owned()))
        .collect();
    let mut known = FOLDERS.map(|(name, _)| name);
    found.sort_unstable();
    known.sort_unstable();
    if found != known {
        return Err(format!("there are captures in {found:?}").into());
    }
    let files: usize = FOLDERS.iter().map(|(_, counts)| counts.files).sum();
    if files == FILES { Ok(()) } else { Err(format!("{files} files are expected, not {FILES}").into()) }
}

/// Compares every netmap of a folder's files with what its JSON says.
fn agree(folder: &Path, expected: Counts) -> Result<(), Failed> {
    let mut counts = Counts::default();
    for file in capture::files(folder)? {
        counts.files += 1;
        for capture in capture::read(&file)? {
            counts.netmaps += 1;
            counts.peers += capture.peers().len();
            compare(&capture).map_err(|why| format!("{}, {}: {why}", file.display(), capture.node))?;
        }
    }
    if counts == expected { Ok(()) } else { Err(format!("{counts:?}, not {expected:?}").into()) }
}

fn compare(capture: &Capture) -> Result<(), String> {
    let message = capture.message()?;
    let netmap = capture.netmap(&mut Session::new(true), message.clone())?;
    nodes::compare(capture, &netmap)?;
    names::compare(capture, &netmap)?;
    routes::compare(capture, &netmap, &message)
}
