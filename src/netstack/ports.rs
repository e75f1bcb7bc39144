//! Local ports for flows: one after the other from a random start, so that a port rests as long as possible.

use std::net::SocketAddr;

use super::OpenError;

/// The ports that flows use. Source: RFC 6335, 6 (the dynamic range begins at 49152); Linux uses 32768-60999.
const FIRST: u16 = 32768;
const COUNT: u16 = u16::MAX - FIRST;

/// The next port to try.
pub(super) struct Ports {
    next: u16,
}

impl Ports {
    pub(super) fn new(seed: u64) -> Self {
        let start = u16::try_from(seed % u64::from(COUNT)).expect("a remainder of COUNT is below it");
        Self { next: start }
    }

    /// The next port that is not `taken`.
    pub(super) fn choose(&mut self, taken: impl Fn(u16) -> bool) -> Result<u16, OpenError> {
        for _ in 0..COUNT {
            let port = FIRST + self.next;
            self.next = (self.next + 1) % COUNT;
            if !taken(port) {
                return Ok(port);
            }
        }
        Err(OpenError::PortsExhausted)
    }
}

/// A port and address as smoltcp wants them.
pub(super) fn endpoint(address: SocketAddr) -> smoltcp::wire::IpEndpoint {
    smoltcp::wire::IpEndpoint::new(address.ip().into(), address.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_used_in_turn_and_taken_ones_are_left_out() {
        let mut ports = Ports::new(u64::MAX);
        let first = ports.choose(|_| false).unwrap();
        let second = ports.choose(|port| port == first + 1).unwrap();
        assert_eq!(second, first + 2);
    }

    #[test]
    fn exhaustion_is_an_error() {
        assert!(matches!(Ports::new(1).choose(|_| true), Err(OpenError::PortsExhausted)));
    }
}
