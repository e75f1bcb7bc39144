//! The device that smoltcp sees: one packet in at most, packets out by a closure.

use smoltcp::phy::{self, Checksum, ChecksumCapabilities, DeviceCapabilities, Medium};
use smoltcp::time::Instant;

/// The most octets of a packet inside the tunnel. Source: Tailscale, net/tstun, `DefaultTUNMTU`.
pub(super) const MTU: usize = 1280;

/// Lives for one poll.
pub(super) struct Device<'d> {
    input: Option<&'d [u8]>,
    scratch: &'d mut [u8],
    output: &'d mut dyn FnMut(&mut [u8]),
}

impl<'d> Device<'d> {
    pub(super) fn new(input: Option<&'d [u8]>, scratch: &'d mut [u8], output: &'d mut dyn FnMut(&mut [u8])) -> Self {
        Self { input, scratch, output }
    }
}

impl phy::Device for Device<'_> {
    type RxToken<'a>
        = Received<'a>
    where
        Self: 'a;
    type TxToken<'a>
        = Sent<'a>
    where
        Self: 'a;

    fn receive(&mut self, _timestamp: Instant) -> Option<(Received<'_>, Sent<'_>)> {
        let packet = self.input.take()?;
        Some((Received(packet), Sent { scratch: self.scratch, output: self.output }))
    }

    fn transmit(&mut self, _timestamp: Instant) -> Option<Sent<'_>> {
        Some(Sent { scratch: self.scratch, output: self.output })
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = MTU;
        // What comes in was authenticated by WireGuard; what goes out is checked by whoever gets it.
        let mut checksum = ChecksumCapabilities::default();
        checksum.ipv4 = Checksum::Tx;
        checksum.tcp = Checksum::Tx;
        checksum.udp = Checksum::Tx;
        capabilities.checksum = checksum;
        capabilities
    }
}

/// The packet that came in.
pub(super) struct Received<'a>(&'a [u8]);

impl phy::RxToken for Received<'_> {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, read: F) -> R {
        read(self.0)
    }
}

/// Room for one packet that goes out.
pub(super) struct Sent<'a> {
    scratch: &'a mut [u8],
    output: &'a mut dyn FnMut(&mut [u8]),
}

impl phy::TxToken for Sent<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, write: F) -> R {
        let packet = &mut self.scratch[..length];
        let written = write(packet);
        (self.output)(packet);
        written
    }
}
