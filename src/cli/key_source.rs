//! Where a secret comes from: a file, standard input, a descriptor, or a variable that was taken out of our environment.
//!
//! What it is, an auth key or an ID token, is [`super::credential`]'s to know.

use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::timeout;
use zeroize::Zeroizing;

use super::handed::{Handed, descriptor_path, read_some};
use crate::fault::{self, Fault};
use crate::lapse::Lapse;

/// What `--auth-key` or `--id-token` says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum KeySource {
    /// The secret is all of this file.
    File(PathBuf),
    /// The secret is the first line of standard input.
    Stdin,
    /// The secret is the first line of this open descriptor.
    Descriptor(u32),
    /// It came in a variable, and over the restart in a pipe.
    Variable(Handed),
    /// A variable was set, but to nothing.
    EmptyVariable,
    /// The word is no source. It may be a secret, so it is forgotten at once.
    NoSource,
}

/// The most bytes read: far above any key, far below what would hurt when the file is another one.
pub(super) const READ_MAX: u64 = 16 * 1024;

impl KeySource {
    /// Reads the value of the flag; never fails, so that clap never quotes it.
    #[expect(clippy::unnecessary_wraps, reason = "clap's value parsers return a Result")]
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        Ok(match text.strip_prefix("file:") {
            Some(path) if !path.is_empty() => Self::File(PathBuf::from(path)),
            _ if text == "-" => Self::Stdin,
            _ => Self::NoSource,
        })
    }

    /// Whether a command that inherits our descriptors could read the secret where we read it: what came through a pipe
    /// is gone from there, but a file can be read again from its beginning.
    ///
    /// # Errors
    /// `TC-2009` for a descriptor that is a file.
    pub(super) fn check_for_command(&self) -> Result<(), Fault> {
        let number = match self {
            Self::Stdin => 0,
            Self::Descriptor(number) => *number,
            Self::File(_) | Self::Variable(_) | Self::EmptyVariable | Self::NoSource => return Ok(()),
        };
        if !descriptor_path(number).metadata().is_ok_and(|it| it.is_file()) {
            return Ok(());
        }
        let name = self.name();
        let detail = format!("{name} is a file, whose secret the command could read again; use a pipe or file:PATH");
        Err(Fault::new(&fault::USAGE, detail))
    }

    /// Reads the secret, within `limit`: a pipe or a terminal may stay silent. Sentences call it `what`.
    ///
    /// # Errors
    /// `TC-1005` and `TC-1006` when it cannot be read, `TC-1002` when it is not text.
    pub(super) async fn read(self, what: &'static str, limit: Duration) -> Result<Zeroizing<String>, Fault> {
        let source = self.pointed_at().unwrap_or(self);
        let name = source.name();
        let (sender, receiver) = oneshot::channel();
        // Nobody is left to hear it once the limit has passed.
        let reader = move || drop(sender.send(source.read_text().map_err(|error| source.unreadable(what, &error))));
        std::thread::Builder::new()
            .name(String::from("auth-key"))
            .spawn(reader)
            .map_err(|error| Fault::new(&fault::OS_REFUSED, format!("no thread to read the {what}: {error}")))?;
        let Ok(Ok(text)) = timeout(limit, receiver).await else {
            return Err(Fault::new(&fault::KEY_UNREADABLE, format!("{name} gave no {what} within {}", Lapse(limit))));
        };
        let text = text?;
        let text = std::str::from_utf8(&text)
            .map_err(|_| Fault::new(&fault::KEY_GARBLED, format!("the {what} from {name} is not text")))?;
        Ok(Zeroizing::new(text.to_owned()))
    }

    /// The file of `TS_AUTHKEY=file:PATH`, a habit of Tailscale's own containers.
    fn pointed_at(&self) -> Option<Self> {
        let Self::Variable(handed) = self else { return None };
        let path = std::str::from_utf8(handed.expose()).ok()?.trim().strip_prefix("file:")?;
        Some(Self::File(PathBuf::from(path)))
    }

    fn read_text(&self) -> io::Result<Zeroizing<Vec<u8>>> {
        match self {
            Self::File(path) => read_some(File::open(path)?, READ_MAX),
            Self::Variable(handed) => Ok(Zeroizing::new(handed.expose().to_vec())),
            Self::Descriptor(number) => {
                let file = File::open(descriptor_path(*number))?;
                read_line(|byte| Ok(rustix::io::read(&file, byte)?))
            }
            Self::Stdin => read_line(|byte| Ok(rustix::io::read(rustix::stdio::stdin(), byte)?)),
            Self::EmptyVariable | Self::NoSource => Ok(Zeroizing::default()),
        }
    }

    /// The source as a sentence names it.
    pub(super) fn name(&self) -> String {
        if let Some(file) = self.pointed_at() {
            return file.name();
        }
        match self {
            Self::File(path) => path.display().to_string(),
            Self::Stdin => String::from("standard input"),
            Self::Descriptor(number) => format!("descriptor {number}"),
            Self::Variable(_) | Self::EmptyVariable => String::from("the environment"),
            Self::NoSource => String::from("the command line"),
        }
    }

    fn unreadable(&self, what: &str, error: &io::Error) -> Fault {
        match (self, error.kind()) {
            (Self::File(path), io::ErrorKind::NotFound) => {
                Fault::new(&fault::KEY_FILE_MISSING, format!("the {what}'s file {} does not exist", path.display()))
            }
            (Self::Descriptor(number), io::ErrorKind::NotFound) => {
                Fault::new(&fault::KEY_UNREADABLE, format!("descriptor {number} is not open"))
            }
            _ => Fault::new(&fault::KEY_UNREADABLE, format!("cannot read the {what} from {}: {error}", self.name())),
        }
    }
}

/// Reads to the end of the line or of the source, a byte at a time: what follows belongs to somebody else.
fn read_line(mut read: impl FnMut(&mut [u8]) -> io::Result<usize>) -> io::Result<Zeroizing<Vec<u8>>> {
    let mut line = Zeroizing::new(Vec::with_capacity(READ_MAX as usize));
    let mut byte = [0u8; 1];
    while line.len() < READ_MAX as usize && read(&mut byte)? == 1 && byte[0] != b'\n' {
        line.push(byte[0]);
    }
    Ok(line)
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::AsRawFd;

    use super::*;

    const KEY: &str = "hskey-auth-abcdef-0123456789";
    const SOON: Duration = Duration::from_secs(5);

    #[test]
    fn a_command_inherits_no_file_with_the_key() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(KEY.as_bytes()).unwrap();
        let descriptor = |it: &dyn AsRawFd| KeySource::Descriptor(u32::try_from(it.as_raw_fd()).unwrap());
        let fault = descriptor(&file).check_for_command().unwrap_err();
        assert_eq!((fault.row, fault.row.exit), (&fault::USAGE, 64));
        let (reader, _writer) = rustix::pipe::pipe().unwrap();
        assert!(descriptor(&reader).check_for_command().is_ok());
        assert!(KeySource::File("/etc/passwd".into()).check_for_command().is_ok());
    }

    #[test]
    fn sources_are_told_apart_and_a_bare_value_is_forgotten() {
        assert_eq!(KeySource::parse("file:/a"), Ok(KeySource::File("/a".into())));
        assert_eq!(KeySource::parse("-"), Ok(KeySource::Stdin));
        for bare in [KEY, "0123", "file:", ""] {
            assert_eq!(KeySource::parse(bare), Ok(KeySource::NoSource));
        }
    }

    #[tokio::test]
    async fn a_descriptor_gives_its_first_line() {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        File::from(writer.try_clone().unwrap()).write_all(format!("{KEY}\nmore").as_bytes()).unwrap();
        let number = u32::try_from(reader.as_raw_fd()).unwrap();
        assert_eq!(KeySource::Descriptor(number).read("auth key", SOON).await.unwrap().as_str(), KEY);
        let silent = KeySource::Descriptor(u32::MAX >> 1).read("auth key", SOON).await.unwrap_err();
        assert_eq!(silent.row, &fault::KEY_UNREADABLE);
    }

    #[tokio::test]
    async fn a_silent_source_ends_at_its_limit() {
        let (reader, _writer) = rustix::pipe::pipe().unwrap();
        let number = u32::try_from(reader.as_raw_fd()).unwrap();
        let fault = KeySource::Descriptor(number).read("ID token", Duration::from_millis(20)).await.unwrap_err();
        assert!(fault.detail.contains("gave no ID token within"), "{}", fault.detail);
    }
}
