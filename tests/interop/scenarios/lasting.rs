//! One connection that lives long: WireGuard's keys change under it, twice and by either side.

use std::io::{Read as _, Write as _};
use std::thread;
use std::time::{Duration, Instant};

use libtest_mimic::Failed;

use crate::bed::Bed;
use crate::say;
use crate::sidecar::Launch;

/// Past the second rekey (120 s each) and past what a key may live (180 s). Source: the WireGuard paper, 6.1.
const LIFE: Duration = Duration::from_secs(250);
/// The pause between two blocks.
const PAUSE: Duration = Duration::from_millis(100);
/// The longest that a block may take: a control outage of another scenario must not show, a loaded machine may.
const STALL: Duration = Duration::from_secs(5);

/// A connection to a real tailscaled carries every byte for longer than any of its keys lives.
pub(crate) fn a_connection_outlives_its_keys(bed: &Bed) -> Result<(), Failed> {
    let mut sidecar = Launch::new(bed).on(&bed.hosts.lasting).ready()?;
    let mut stream = sidecar.dial("web", 7)?;
    stream.set_read_timeout(Some(Duration::from_secs(30)))?;
    let (start, mut count, mut longest) = (Instant::now(), 0_u64, Duration::ZERO);
    while start.elapsed() < LIFE {
        let block: Vec<u8> = (0..512_u64).flat_map(|at| (count * 512 + at).to_le_bytes()).collect();
        let sent = Instant::now();
        stream.write_all(&block)?;
        let mut back = vec![0; block.len()];
        stream.read_exact(&mut back)?;
        if back != block {
            return Err(format!("block {count} came back otherwise").into());
        }
        longest = longest.max(sent.elapsed());
        count += 1;
        thread::sleep(PAUSE);
    }
    sidecar.terminate()?;
    let log = sidecar.process.log();
    let handshakes = log.rsplit_once(" handshakes: ").and_then(|(_, rest)| rest.split(',').next());
    let handshakes: u32 = handshakes.ok_or("no count of handshakes in the log")?.parse()?;
    say(&format!(
        "         {count} blocks of 4 KiB in {} s, longest {} ms, {handshakes} handshake messages sent",
        LIFE.as_secs(),
        longest.as_millis()
    ));
    // One session lives 180 s at most, so that the second and third were made under the connection.
    if handshakes < 3 || longest > STALL {
        return Err(format!("{handshakes} handshake messages, longest pause {longest:?}").into());
    }
    Ok(())
}
