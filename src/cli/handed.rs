//! How a secret disappears from the environment that it came in.
//!
//! A variable's value stays readable in `/proc/PID/environ` for as long as the process lives, whatever the process
//! does to its own copy. So when secrets come in variables, we start ourselves once more in the same process
//! (`execve`), without them, and hand them over in a pipe: 1 ms, and nothing to read afterwards.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use rustix::fs::OFlags;
use rustix::pipe::PipeFlags;
use zeroize::Zeroizing;

use super::environment::{Environment, KEY_PIPE, SECRETS, present};
use super::key_source::READ_MAX;
use crate::fault::{self, Fault};
use crate::provision::IdToken;

/// What a variable held. Wiped when dropped, and never shown.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Handed(Zeroizing<Vec<u8>>);

impl Handed {
    /// The value.
    pub(super) fn expose(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Handed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Handed([redacted])")
    }
}

/// The most octets of one value: all of them, with their names, have to fit into a pipe that nobody reads yet (64 KiB).
const VALUE_MAX: usize = IdToken::MAX;

/// What stands for a longer one, and has no secret's form: a beginning alone could pass for the whole.
static TOO_LONG: [u8; VALUE_MAX + 1] = [b'x'; VALUE_MAX + 1];

/// Takes what was handed over out of its pipe, by variable. A child inherits the pipe, and must find it empty.
///
/// # Errors
/// `TC-1006` for a pipe that cannot be read.
pub(super) fn take(env: &Environment) -> Result<BTreeMap<String, Handed>, Fault> {
    let number = present(env, KEY_PIPE).and_then(|text| text.to_str()?.parse().ok());
    let Some(number) = number else { return Ok(BTreeMap::new()) };
    let all = empty_pipe(number).map_err(|error| {
        Fault::new(&fault::KEY_UNREADABLE, format!("cannot read the secret from the environment: {error}"))
    })?;
    let pairs = all.split(|byte| *byte == 0).filter_map(|pair| {
        let at = pair.iter().position(|byte| *byte == b'=')?;
        let name = std::str::from_utf8(&pair[..at]).ok()?;
        Some((name.to_owned(), Handed(Zeroizing::new(pair[at + 1..].to_vec()))))
    });
    Ok(pairs.collect())
}

/// A second opening of one of our descriptors: the safe way to what was inherited by number.
pub(super) fn descriptor_path(number: u32) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{number}"))
}

/// Reads all of a file that is no longer than `most`, else its beginning.
pub(super) fn read_some(file: File, most: u64) -> io::Result<Zeroizing<Vec<u8>>> {
    // The capacity is there from the start: growing would leave copies behind that nobody wipes.
    let mut text = Zeroizing::new(Vec::with_capacity(most as usize));
    file.take(most).read_to_end(&mut text)?;
    Ok(text)
}

/// Empties the pipe of [`leave_environment`], which holds all of it and has no writer left. Somebody else's number may
/// be a pipe that is written to: it is not waited for.
fn empty_pipe(number: u32) -> io::Result<Zeroizing<Vec<u8>>> {
    let nonblocking = i32::try_from(OFlags::NONBLOCK.bits()).map_err(io::Error::other)?;
    let pipe = OpenOptions::new().read(true).custom_flags(nonblocking).open(descriptor_path(number))?;
    read_some(pipe, SECRETS.len() as u64 * READ_MAX)
}

/// Starts ourselves anew without secrets in the environment; returns only when there are none, or when that failed.
///
/// # Errors
/// `TC-2007` when the pipe or the new start is refused.
pub(super) fn leave_environment(env: &Environment) -> Result<(), Fault> {
    let found: Vec<_> = SECRETS.iter().filter_map(|name| Some((*name, present(env, name)?.as_bytes()))).collect();
    if found.is_empty() {
        return Ok(());
    }
    let refused = |what: &str, error: io::Error| {
        Fault::new(&fault::OS_REFUSED, format!("cannot take the secrets out of the environment: {what}: {error}"))
    };
    // Where the system grants only a small pipe, a full one is an error and not a wait without end.
    let (reader, writer) =
        rustix::pipe::pipe_with(PipeFlags::NONBLOCK).map_err(|error| refused("pipe", error.into()))?;
    let mut writer = File::from(writer);
    for (name, value) in found {
        let value = value.trim_ascii();
        let value = if value.len() > VALUE_MAX { TOO_LONG.as_slice() } else { value };
        for part in [name.as_bytes(), b"=", value, b"\0"] {
            writer.write_all(part).map_err(|error| refused("pipe", error))?;
        }
    }
    drop(writer);
    let program = std::env::current_exe().map_err(|error| refused("own path", error))?;
    let mut words = std::env::args_os();
    let mut command = Command::new(program);
    command.arg0(words.next().unwrap_or_else(|| OsString::from("tailcar"))).args(words);
    for name in SECRETS {
        command.env_remove(name);
    }
    command.env(KEY_PIPE, reader.as_raw_fd().to_string());
    Err(refused("execve", command.exec()))
}

#[cfg(test)]
impl Handed {
    /// A pipe as the restart leaves it, which has to be kept, and the variable that names it.
    pub(super) fn over(pairs: &[(&str, &str)]) -> (File, Environment) {
        let (reader, writer) = rustix::pipe::pipe().expect("the system has pipes");
        let text: String = pairs.iter().map(|(name, value)| format!("{name}={value}\0")).collect();
        File::from(writer).write_all(text.as_bytes()).expect("a pipe holds it");
        let number = OsString::from(reader.as_raw_fd().to_string());
        (File::from(reader), Environment::from([(OsString::from(KEY_PIPE), number)]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_handed_over_is_there_once() {
        let (mut pipe, env) = Handed::over(&[("TS_AUTHKEY", "a=b\nc"), ("TS_ID_TOKEN", "x.y.z")]);
        let all = take(&env).unwrap();
        assert_eq!(all["TS_AUTHKEY"].expose(), b"a=b\nc");
        assert_eq!((all["TS_ID_TOKEN"].expose(), all.len()), (&b"x.y.z"[..], 2));
        assert_eq!(format!("{:?}", all["TS_AUTHKEY"]), "Handed([redacted])");
        let mut left = String::new();
        pipe.read_to_string(&mut left).unwrap();
        assert_eq!(left, "");
    }

    #[test]
    fn without_a_secret_in_the_environment_nothing_happens() {
        assert!(leave_environment(&Environment::from([("TS_AUTHKEY".into(), "".into())])).is_ok());
        assert!(take(&Environment::new()).unwrap().is_empty());
    }
}
