//! Everybody on one processor: what a round trip costs when no idle processor has to be woken for it.
//!
//! Waking one costs some 50 us on a virtual machine, a round trip wakes half a dozen processes, and the kernel decides
//! anew in each run which of them share a processor: that rules the figures of an idle machine, whoever is measured.

use std::fs;
use std::io;

use rustix::process::Pid;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// Threads that are held on one processor until it is dropped.
#[derive(Debug)]
pub(crate) struct Pinned {
    held: Vec<(Pid, CpuSet)>,
}

impl Pinned {
    /// Holds all threads of these processes, and of this one, on the first processor that this one may use.
    ///
    /// # Errors
    /// When a process is gone, or may not be held.
    pub(crate) fn to_one(pids: &[u32]) -> io::Result<Self> {
        let ours = sched_getaffinity(None)?;
        let first = (0..CpuSet::MAX_CPU).find(|cpu| ours.is_set(*cpu)).ok_or(io::ErrorKind::NotFound)?;
        let mut one = CpuSet::new();
        one.set(first);
        let mut pinned = Self { held: Vec::new() };
        for pid in pids.iter().copied().chain([std::process::id()]) {
            for entry in fs::read_dir(format!("/proc/{pid}/task"))? {
                let number = entry?.file_name().to_string_lossy().parse().ok();
                let Some(thread) = number.and_then(Pid::from_raw) else { continue };
                pinned.held.push((thread, sched_getaffinity(Some(thread))?));
                sched_setaffinity(Some(thread), &one)?;
            }
        }
        Ok(pinned)
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        for (thread, before) in &self.held {
            // One that has ended meanwhile is held no more.
            let _ = sched_setaffinity(Some(*thread), before);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_held_is_held_on_one_processor_until_it_is_let_go() {
        let before = sched_getaffinity(None).unwrap();
        let pinned = Pinned::to_one(&[]).unwrap();
        assert_eq!(sched_getaffinity(None).unwrap().count(), 1);
        drop(pinned);
        assert_eq!(sched_getaffinity(None).unwrap(), before);
    }
}
