//! Everybody on one processor: what a round trip costs when no idle processor has to be woken for it.
//!
//! Waking one costs some 50 us on a virtual machine, a round trip wakes half a dozen processes, and the kernel decides
//! anew in each run which of them share a processor: that rules the figures of an idle machine, whoever is measured.

use std::fs;
use std::io;

use rustix::io::Errno;
use rustix::process::Pid;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// Processes that are held on one processor until it is dropped.
#[derive(Debug)]
pub(crate) struct Pinned {
    pids: Vec<u32>,
    before: CpuSet,
}

impl Pinned {
    /// Holds all threads of these processes, and of this one, on the first processor that this one may use.
    ///
    /// # Errors
    /// When a process is gone, or may not be held.
    pub(crate) fn to_one(pids: &[u32]) -> io::Result<Self> {
        let before = sched_getaffinity(None)?;
        let first = (0..CpuSet::MAX_CPU).find(|cpu| before.is_set(*cpu)).ok_or(io::ErrorKind::NotFound)?;
        let mut one = CpuSet::new();
        one.set(first);
        let pinned = Self { pids: pids.iter().copied().chain([std::process::id()]).collect(), before };
        pinned.pids.iter().try_for_each(|pid| hold(*pid, &one))?;
        Ok(pinned)
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        for pid in &self.pids {
            // One that has ended meanwhile is held no more.
            let _ = hold(*pid, &self.before);
        }
    }
}

/// Holds all threads of a process on these processors, and looks again as long as it finds others: they have the
/// processors of the thread that made them.
fn hold(pid: u32, on: &CpuSet) -> io::Result<()> {
    loop {
        let mut others = 0;
        for entry in fs::read_dir(format!("/proc/{pid}/task"))? {
            let number = entry?.file_name().to_string_lossy().parse().ok();
            let Some(thread) = number.and_then(Pid::from_raw) else { continue };
            match sched_getaffinity(Some(thread)) {
                Ok(now) if now == *on => continue,
                Ok(_) => others += 1,
                Err(Errno::SRCH) => continue,
                Err(error) => return Err(error.into()),
            }
            match sched_setaffinity(Some(thread), on) {
                Ok(()) | Err(Errno::SRCH) => {}
                Err(error) => return Err(error.into()),
            }
        }
        if others == 0 {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_held_is_held_on_one_processor_until_it_is_let_go() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let of = |pid: u32| sched_getaffinity(Pid::from_raw(pid.cast_signed())).unwrap();
        let before = of(child.id());
        let pinned = Pinned::to_one(&[child.id()]).unwrap();
        let mut born_held = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let held = [child.id(), born_held.id()].map(|pid| of(pid).count());
        drop(pinned);
        let after = of(child.id());
        for child in [&mut child, &mut born_held] {
            child.kill().unwrap();
            child.wait().unwrap();
        }
        assert_eq!((held, after), ([1, 1], before));
    }
}
