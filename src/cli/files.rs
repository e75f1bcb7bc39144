//! The files that a run was asked to write, and no others: each whole, then renamed, readable by the owner alone.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::settings::Output;
use crate::fault::{self, Fault};

/// The ready file, status file and pid file of one run. Dropped, they are gone but for the status file.
#[derive(Debug)]
pub(super) struct Files {
    ready: Option<PathBuf>,
    status: Option<PathBuf>,
    pid: Option<PathBuf>,
    /// Whether they are ours: before, they may belong to another run.
    open: bool,
}

impl Files {
    /// The files that were asked for; none is touched yet.
    pub(super) fn new(output: &Output) -> Self {
        Self {
            ready: output.ready_file.clone(),
            status: output.status_file.clone(),
            pid: output.pidfile.clone(),
            open: false,
        }
    }

    /// Writes the pid file and the first status, and takes an earlier run's ready file away: whoever waits for it must
    /// not be told of a node that is gone. What cannot be written is known before a key is spent.
    ///
    /// # Errors
    /// `TC-2005`.
    pub(super) fn open(&mut self, status: &str) -> Result<(), Fault> {
        self.open = true;
        if let Some(path) = &self.ready {
            write(path, "")?;
            remove(path);
        }
        if let Some(path) = &self.pid {
            write(path, &format!("{}\n", std::process::id()))?;
        }
        self.status(status)
    }

    /// Replaces the status file.
    ///
    /// # Errors
    /// `TC-2005`.
    pub(super) fn status(&self, line: &str) -> Result<(), Fault> {
        self.status.as_deref().map_or(Ok(()), |path| write(path, &format!("{line}\n")))
    }

    /// Writes the ready file, the status file first: whoever sees the one may read the other.
    ///
    /// # Errors
    /// `TC-2005`.
    pub(super) fn ready(&self, line: &str) -> Result<(), Fault> {
        self.status(line)?;
        self.ready.as_deref().map_or(Ok(()), |path| write(path, &format!("{line}\n")))
    }

    /// Takes the ready file away: the node is about to leave.
    pub(super) fn not_ready(&self) {
        if let Some(path) = &self.ready {
            remove(path);
        }
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        if !self.open {
            return;
        }
        self.not_ready();
        if let Some(path) = &self.pid {
            remove(path);
        }
    }
}

/// Writes all of `text` beside `path`, then renames, so that nobody ever reads half of it.
fn write(path: &Path, text: &str) -> Result<(), Fault> {
    let failed =
        |error: io::Error| Fault::new(&fault::FILE_NOT_WRITTEN, format!("cannot write {}: {error}", path.display()));
    let name = path.file_name().ok_or_else(|| failed(io::ErrorKind::IsADirectory.into()))?;
    let part = path.with_file_name(format!(".{}.{}", name.to_string_lossy(), std::process::id()));
    let written = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&part)
        .and_then(|mut file| file.write_all(text.as_bytes()))
        .and_then(|()| fs::rename(&part, path));
    written.map_err(|error| {
        remove(&part);
        failed(error)
    })
}

fn remove(path: &Path) {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            tracing::debug!(%error, path = %path.display(), "cannot remove a file");
        }
        Ok(()) | Err(_) => {}
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::super::args::{LogFormat, OutputFormat};
    use super::*;

    fn output(folder: &Path) -> Output {
        Output {
            format: OutputFormat::Text,
            log_format: LogFormat::Text,
            log_filter: String::from("warn"),
            quiet: false,
            run_id: String::from("r"),
            labels: Vec::new(),
            ready_file: Some(folder.join("ready")),
            status_file: Some(folder.join("status")),
            pidfile: Some(folder.join("pid")),
        }
    }

    #[test]
    fn files_are_private_and_gone_at_the_end_but_for_the_status() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        fs::write(path("ready"), "stale").unwrap();
        let mut files = Files::new(&output(folder.path()));
        files.open("starting").unwrap();
        assert!(!path("ready").exists());
        assert_eq!(fs::read_to_string(path("pid")).unwrap(), format!("{}\n", std::process::id()));
        files.ready("yes").unwrap();
        for name in ["ready", "status"] {
            assert_eq!(fs::read_to_string(path(name)).unwrap(), "yes\n");
            assert_eq!(fs::metadata(path(name)).unwrap().permissions().mode() & 0o777, 0o600);
        }
        drop(files);
        let left: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["status"]);
    }

    #[test]
    fn what_cannot_be_written_is_said_at_once() {
        let folder = tempfile::tempdir().unwrap();
        let fault = Files::new(&output(&folder.path().join("missing"))).open("starting").unwrap_err();
        assert_eq!((fault.row, fault.row.exit), (&fault::FILE_NOT_WRITTEN, 73));
    }
}
