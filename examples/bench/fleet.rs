//! A hundred tailcars on one host, each with a ready file that says when it is ready.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use libtest_mimic::Failed;
use rustix::process::Signal;

use crate::bed::Bed;
use crate::contender::{Contender, alone};
use crate::headscale::CONTROL;
use crate::namespace::Namespace;
use crate::process::Process;
use crate::usage;

/// All that were started.
pub(crate) struct Fleet {
    sidecars: Vec<(Process, PathBuf)>,
}

impl Fleet {
    /// Starts them as fast as they can be started, each on a port of its own choice.
    ///
    /// # Errors
    /// Those of starting.
    pub(crate) fn start(bed: &Bed, host: &Namespace, count: usize) -> Result<Self, Failed> {
        let program = Contender::Tailcar.program(&bed.peers);
        let key = bed.folder.join("fleet-key");
        fs::write(&key, &bed.key.secret)?;
        let mut sidecars = Vec::with_capacity(count);
        for number in 0..count {
            let name = format!("bench-fleet-{number}");
            let ready = bed.folder.join(format!("{name}.ready"));
            let mut command = host.command(&program);
            command.env("HOME", &bed.folder).arg("run").arg("--login-server").arg(format!("https://{CONTROL}"));
            command.args(["--hostname", &name, "--listen", "127.0.0.1:0"]).arg("--ca-file").arg(&bed.authority);
            command.arg("--auth-key").arg(format!("file:{}", key.display())).arg("--ready-file").arg(&ready);
            sidecars.push((Process::start(command, &name, &bed.folder, false)?, ready));
        }
        Ok(Self { sidecars })
    }

    /// Whether one is ready.
    pub(crate) fn ready(&self, number: usize) -> bool {
        self.sidecars.get(number).is_some_and(|(_, ready)| ready.exists())
    }

    /// What they take together, in MiB: the program's own pages, which they share, once.
    pub(crate) fn memory(&self) -> f64 {
        self.sidecars.iter().filter_map(|(process, _)| usage::proportional(process.id())).sum()
    }

    /// Ends them all, and waits until the control server lists none.
    ///
    /// # Errors
    /// When one stays.
    pub(crate) fn leave(mut self, bed: &Bed) -> Result<(), Failed> {
        self.sidecars.iter().for_each(|(process, _)| process.signal(Signal::TERM));
        for (process, _) in &mut self.sidecars {
            process.wait(Duration::from_secs(15))?;
        }
        alone(bed)
    }
}
