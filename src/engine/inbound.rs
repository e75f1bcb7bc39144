//! What may come in: answers to the flows that we opened, and nothing else.
//!
//! The node serves nobody, so policy's filter rules are not consulted: a packet is admitted when its inner source
//! belongs to the peer that sent it, its destination is ours, and its flow is open or quoted by an ICMP error.
//! TSMP is taken out for the engine itself. Source: Tailscale, wgengine/filter, `RunIn`, with zero rules.

use std::collections::HashSet;
use std::net::SocketAddr;

use super::stats::Dropped;
use crate::netmap::{Netmap, Peer};
use crate::wire::ip::{Header, protocol};
use crate::wire::tsmp;

/// The transport of a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl Protocol {
    const fn from_number(number: u8) -> Option<Self> {
        match number {
            protocol::TCP => Some(Self::Tcp),
            protocol::UDP => Some(Self::Udp),
            _ => None,
        }
    }
}

/// A connection, or a UDP exchange, inside the tailnet that we opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Flow {
    /// TCP or UDP.
    pub protocol: Protocol,
    /// Our address and port.
    pub local: SocketAddr,
    /// Theirs.
    pub remote: SocketAddr,
}

/// What to do with an inner packet.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Give its first bytes, that many, to the netstack.
    Admit(usize),
    /// It is for the engine.
    Tsmp(Header, tsmp::Message),
    /// Drop it.
    Drop(Dropped),
}

/// The open flows.
#[derive(Debug, Default)]
pub(super) struct Inbound {
    flows: HashSet<Flow>,
}

impl Inbound {
    pub(super) fn open(&mut self, flow: Flow) {
        self.flows.insert(flow);
    }

    pub(super) fn close(&mut self, flow: &Flow) {
        self.flows.remove(flow);
    }

    /// Judges a packet that `peer` sent through its tunnel.
    pub(super) fn judge(&self, netmap: &Netmap, peer: &Peer, packet: &[u8]) -> Verdict {
        let Ok(header) = Header::parse(packet) else {
            return Verdict::Drop(Dropped::Malformed);
        };
        if !netmap.allowed(peer, header.source) {
            return Verdict::Drop(Dropped::SpoofedSource);
        }
        if !netmap.is_ours(peer, header.destination) {
            return Verdict::Drop(Dropped::NotForUs);
        }
        if header.fragment {
            return Verdict::Drop(Dropped::Fragment);
        }
        if header.protocol == protocol::TSMP {
            return match tsmp::Message::parse(&packet[header.payload..header.end]) {
                Ok(message) => Verdict::Tsmp(header, message),
                Err(_) => Verdict::Drop(Dropped::Malformed),
            };
        }
        if self.answers_a_flow(&header, packet) {
            Verdict::Admit(header.end)
        } else {
            Verdict::Drop(Dropped::Unsolicited)
        }
    }

    /// The flow that a rejection is about, if it is ours.
    pub(super) fn rejected(&self, header: &Header, number: u8, ports: (u16, u16)) -> Option<Flow> {
        let (local_port, remote_port) = ports;
        let flow = Flow {
            protocol: Protocol::from_number(number)?,
            local: SocketAddr::new(header.destination, local_port),
            remote: SocketAddr::new(header.source, remote_port),
        };
        self.flows.get(&flow).copied()
    }

    fn answers_a_flow(&self, header: &Header, packet: &[u8]) -> bool {
        if let Some(quoted) = header.quoted(packet) {
            // The quoted packet is one that we sent: its source must be the address the error came to.
            return Header::parse_quoted(quoted).is_ok_and(|sent| {
                sent.source == header.destination
                    && self.holds(sent.protocol, sent.source_socket(), sent.destination_socket())
            });
        }
        self.holds(header.protocol, header.destination_socket(), header.source_socket())
    }

    fn holds(&self, number: u8, local: Option<SocketAddr>, remote: Option<SocketAddr>) -> bool {
        let (Some(protocol), Some(local), Some(remote)) = (Protocol::from_number(number), local, remote) else {
            return false;
        };
        self.flows.contains(&Flow { protocol, local, remote })
    }
}
