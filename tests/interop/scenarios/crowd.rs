//! Many connections: side by side, one after the other, and idle.

use std::io::{Read as _, Write as _};
use std::thread;

use libtest_mimic::Failed;

use crate::bed::Bed;
use crate::sidecar::{Launch, Sidecar};

fn echo(stream: &mut std::net::TcpStream, word: &[u8]) -> Result<(), Failed> {
    stream.write_all(word)?;
    let mut back = vec![0; word.len()];
    stream.read_exact(&mut back)?;
    match back == word {
        true => Ok(()),
        false => Err("another connection's bytes".into()),
    }
}

/// Two hundred connections at once, each with its own bytes.
pub(crate) fn two_hundred_connections_at_once_keep_apart(bed: &Bed) -> Result<(), Failed> {
    let sidecar = Launch::new(bed).ready()?;
    thread::scope(|scope| {
        let workers: Vec<_> = (0..200)
            .map(|number: u32| {
                scope.spawn({
                    let sidecar: &Sidecar<'_> = &sidecar;
                    move || -> Result<(), Failed> {
                        let mut stream =
                            sidecar.dial(if number.is_multiple_of(2) { "web" } else { "10.20.0.80" }, 7)?;
                        for round in 0..20_u32 {
                            echo(&mut stream, format!("connection {number} round {round}").repeat(40).as_bytes())?;
                        }
                        Ok(())
                    }
                })
            })
            .collect();
        for worker in workers {
            worker.join().map_err(|_| "a thread panicked")??;
        }
        Ok(())
    })
}

/// Two thousand short connections, twenty at a time.
pub(crate) fn two_thousand_short_connections_leave_room_for_more(bed: &Bed) -> Result<(), Failed> {
    let sidecar = Launch::new(bed).ready()?;
    thread::scope(|scope| {
        let workers: Vec<_> = (0..20)
            .map(|worker: u32| {
                scope.spawn({
                    let sidecar: &Sidecar<'_> = &sidecar;
                    move || -> Result<(), Failed> {
                        for round in 0..100_u32 {
                            let mut stream = sidecar.dial("web", 7)?;
                            echo(&mut stream, format!("{worker} {round}").as_bytes())?;
                        }
                        Ok(())
                    }
                })
            })
            .collect();
        for worker in workers {
            worker.join().map_err(|_| "a thread panicked")??;
        }
        Ok::<(), Failed>(())
    })?;
    sidecar.page("web", "web")
}
