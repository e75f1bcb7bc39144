//! The files that a run was asked to write, and no others: each whole, then renamed, readable by the owner alone.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use super::settings::Output;
use crate::fault::{self, Fault};

/// The ready file, status file and pid file of one run. Dropped, they are gone but for the status file.
#[derive(Debug)]
pub(super) struct Files {
    paths: Paths,
    /// Whether they are ours: before, they may belong to another run.
    open: bool,
}

/// Where they are.
#[derive(Debug, Clone)]
struct Paths {
    ready: Option<PathBuf>,
    status: Option<PathBuf>,
    pid: Option<PathBuf>,
}

/// The files of this process's run, for [`abandon`]: a panic has no hold of [`Files`].
static OPEN: OnceLock<Paths> = OnceLock::new();

/// Takes the ready file and the pid file away and leaves `status` in the status file, when the process is about to
/// end without its destructors.
pub(super) fn abandon(status: &str) {
    let Some(paths) = OPEN.get() else { return };
    for path in [&paths.ready, &paths.pid].into_iter().flatten() {
        remove(path);
    }
    if let Some(path) = &paths.status {
        // Whoever reads it late learns it from the exit status.
        let _ = write(path, &format!("{status}\n"));
    }
}

impl Files {
    /// The files that were asked for; none is touched yet.
    pub(super) fn new(output: &Output) -> Self {
        let paths =
            Paths { ready: output.ready_file.clone(), status: output.status_file.clone(), pid: output.pidfile.clone() };
        Self { paths, open: false }
    }

    /// Writes the pid file and the first status, and takes an earlier run's ready file away: whoever waits for it must
    /// not be told of a node that is gone. What cannot be written is known before a key is spent.
    ///
    /// # Errors
    /// `TC-2005`.
    pub(super) fn open(&mut self, status: &str) -> Result<(), Fault> {
        self.open = true;
        // Only tests have a second run in one process.
        let _ = OPEN.set(self.paths.clone());
        if let Some(path) = &self.paths.ready {
            try_out(path)?;
        }
        if let Some(path) = &self.paths.pid {
            write(path, &format!("{}\n", std::process::id()))?;
        }
        self.status(status)
    }

    /// Replaces the status file.
    ///
    /// # Errors
    /// `TC-2005`.
    pub(super) fn status(&self, line: &str) -> Result<(), Fault> {
        self.paths.status.as_deref().map_or(Ok(()), |path| write(path, &format!("{line}\n")))
    }

    /// Writes the ready file, the status file first: whoever sees the one may read the other.
    ///
    /// # Errors
    /// `TC-2005`.
    pub(super) fn ready(&self, line: &str) -> Result<(), Fault> {
        self.status(line)?;
        self.paths.ready.as_deref().map_or(Ok(()), |path| write(path, &format!("{line}\n")))
    }

    /// Takes the ready file away: the node is about to leave.
    pub(super) fn not_ready(&self) {
        if let Some(path) = &self.paths.ready {
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
        if let Some(path) = &self.paths.pid {
            remove(path);
        }
    }
}

/// Writes all of `text` beside `path`, then renames, so that nobody ever reads half of it.
fn write(path: &Path, text: &str) -> Result<(), Fault> {
    let part = part_of(path)?;
    let written =
        create(&part).and_then(|mut file| file.write_all(text.as_bytes())).and_then(|()| fs::rename(&part, path));
    written.map_err(|error| {
        remove(&part);
        not_written(path, &error)
    })
}

/// Finds out whether `path` can be written, without ever being there: an older file is taken away.
fn try_out(path: &Path) -> Result<(), Fault> {
    let part = part_of(path)?;
    let tried = create(&part).and_then(|_| fs::remove_file(&part)).and_then(|()| match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed @ (Ok(()) | Err(_)) => removed,
    });
    tried.map_err(|error| not_written(path, &error))
}

/// Where a file is written before it takes its name.
fn part_of(path: &Path) -> Result<PathBuf, Fault> {
    let name = path.file_name().ok_or_else(|| not_written(path, &io::ErrorKind::IsADirectory.into()))?;
    Ok(path.with_file_name(format!(".{}.{}", name.to_string_lossy(), std::process::id())))
}

/// A new file of our own. What is there by that name is an earlier process's with our number, or a trap: a link would
/// be followed, and an old file would keep its owner and mode.
fn create(part: &Path) -> io::Result<File> {
    let new = || OpenOptions::new().write(true).create_new(true).mode(0o600).open(part);
    match new() {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => fs::remove_file(part).and_then(|()| new()),
        file @ (Ok(_) | Err(_)) => file,
    }
}

fn not_written(path: &Path, error: &io::Error) -> Fault {
    Fault::new(&fault::FILE_NOT_WRITTEN, format!("cannot write {}: {error}", path.display()))
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
    use std::os::unix::fs::{PermissionsExt, symlink};

    use rustix::fs::inotify;

    use super::*;

    fn output(folder: &Path) -> Output {
        Output {
            ready_file: Some(folder.join("ready")),
            status_file: Some(folder.join("status")),
            pidfile: Some(folder.join("pid")),
            ..Output::quiet()
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
    #[test]
    fn a_link_in_the_way_is_not_followed_and_an_old_file_lends_no_mode() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        let part = part_of(&path("status")).unwrap();
        fs::write(path("victim"), "untouched").unwrap();
        symlink(path("victim"), &part).unwrap();
        write(&path("status"), "one").unwrap();
        assert_eq!(fs::read_to_string(path("victim")).unwrap(), "untouched");
        fs::write(&part, "old").unwrap();
        fs::set_permissions(&part, fs::Permissions::from_mode(0o666)).unwrap();
        write(&path("status"), "two").unwrap();
        let status = fs::symlink_metadata(path("status")).unwrap();
        assert_eq!((status.is_file(), status.permissions().mode() & 0o777), (true, 0o600));
        assert_eq!(fs::read_to_string(path("status")).unwrap(), "two");
    }

    #[test]
    fn the_ready_file_is_never_there_before_it_is_true() {
        let folder = tempfile::tempdir().unwrap();
        let watch = inotify::init(inotify::CreateFlags::NONBLOCK).unwrap();
        let appears = inotify::WatchFlags::CREATE | inotify::WatchFlags::MOVED_TO;
        inotify::add_watch(&watch, folder.path(), appears).unwrap();
        let mut files = Files::new(&output(folder.path()));
        files.open("starting").unwrap();
        let mut buffer = [std::mem::MaybeUninit::uninit(); 4096];
        let mut events = inotify::Reader::new(&watch, &mut buffer);
        let mut seen = Vec::new();
        while let Ok(event) = events.next() {
            seen.extend(event.file_name().map(|name| name.to_string_lossy().into_owned()));
        }
        assert!(seen.iter().any(|name| name == "status") && !seen.iter().any(|name| name == "ready"), "{seen:?}");
    }

    #[test]
    fn a_folder_where_the_ready_file_should_be_is_said_at_once() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("ready")).unwrap();
        let fault = Files::new(&output(folder.path())).open("starting").unwrap_err();
        assert_eq!(fault.row, &fault::FILE_NOT_WRITTEN);
    }
}
