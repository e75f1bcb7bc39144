//! The other end as Tailscale's client: its engine sends all by DERP, and [`Trusting`] decides which way that really
//! goes.

use std::net::SocketAddr;
use std::time::Duration;

use rand::Rng;
use tailcar::engine::Transport;
use tailcar::key::NodePublic;
use tailcar::netmap::RegionId;
use tailcar::wire::disco::{self, Message};
use tailcar::wire::tailcfg::map::EndpointType;

use crate::control::stun_server;
use crate::node::number;
use crate::trusting::{Said, Trusting};
use crate::weather::Lost;
use crate::world::{DERP_DELAY, Delivery, World};

/// How often it asks where it is.
const STUN: Duration = Duration::from_secs(23);

impl World {
    /// Node 1 is Tailscale's client.
    pub(crate) fn trust(&mut self) {
        let node = &mut self.nodes[1];
        (node.trusting, node.transport) = (Some(Trusting::default()), Transport::Derp);
        node.restart(0, self.now);
    }

    /// A STUN server has told the other end where it is, if that was long ago.
    pub(crate) fn look(&mut self, index: usize) {
        let (inside, site) = (self.nodes[index].inside, self.nodes[index].site);
        let looked = self.nodes[index].looked_at.is_some_and(|at| self.now.duration_since(at) < STUN);
        if self.nodes[index].trusting.is_none() || looked {
            return;
        }
        let seen = self.sites[site].leave(inside, stun_server(1), &mut self.rng, self.now);
        let mut endpoints = vec![(inside, EndpointType::Local)];
        endpoints.extend(seen.filter(|seen| *seen != inside).map(|seen| (seen, EndpointType::Stun)));
        self.nodes[index].looked_at = Some(self.now);
        if self.nodes[index].host.endpoints != endpoints {
            self.nodes[index].host.endpoints = endpoints;
            self.tell(1 - index);
        }
    }

    /// What the other end says by itself.
    pub(crate) fn speak(&mut self, index: usize) {
        while let Some(said) = self.nodes[index].trusting.as_mut().and_then(Trusting::poll) {
            match said {
                Said::Ping(to, tx) => {
                    let message = Message::Ping { tx, node: Some(self.nodes[index].public()) };
                    let datagram = self.sealed(index, &message);
                    self.send_udp(index, to, &datagram);
                }
                Said::Pong(..) if self.loses(Lost::Pong) => {}
                Said::Pong(to, tx) => {
                    let datagram = self.sealed(index, &Message::Pong { tx, source: to });
                    self.send_udp(index, to, &datagram);
                }
                Said::Call => {
                    self.look(index);
                    let endpoints = self.nodes[index].host.endpoints.iter().map(|(endpoint, _)| *endpoint).collect();
                    let packet = self.sealed(index, &Message::CallMeMaybe { endpoints });
                    let (region, to) = (self.nodes[1 - index].host.home.unwrap_or(1), self.nodes[1 - index].public());
                    self.push(DERP_DELAY, Delivery::Derp { region, from: index, to, packet });
                }
            }
        }
    }

    fn sealed(&mut self, index: usize, message: &Message) -> Vec<u8> {
        let shared = disco::shared_key(&self.nodes[index].disco, &self.nodes[1 - index].disco.public());
        disco::seal(message, &self.nodes[index].disco.public(), &shared, self.rng.random())
    }

    /// The engine of the other end sends a packet by DERP.
    pub(crate) fn send_derp(&mut self, index: usize, region: RegionId, to: NodePublic, packet: Vec<u8>) {
        if index == 0 && disco::sender(&packet).is_ok() && self.loses(Lost::Call) {
            return;
        }
        self.look(index);
        let (mut udp, mut derp) = (None, true);
        if let Some(trusting) = self.nodes[index].trusting.as_mut().filter(|_| disco::sender(&packet).is_err()) {
            (udp, derp) = trusting.send(self.now);
        }
        if let Some(to) = udp {
            self.send_udp(index, to, &packet);
        }
        if derp {
            self.nodes[index].sent.derp += 1;
            self.push(DERP_DELAY, Delivery::Derp { region, from: index, to, packet });
        }
    }

    /// A disco packet comes to the other end; `from` by UDP. Whether it was one.
    pub(crate) fn hear(&mut self, index: usize, from: Option<SocketAddr>, packet: &mut [u8]) -> bool {
        if disco::sender(packet).is_err() {
            return false;
        }
        let (now, shared) =
            (self.now, disco::shared_key(&self.nodes[index].disco, &self.nodes[1 - index].disco.public()));
        let Some(trusting) = self.nodes[index].trusting.as_mut() else { return false };
        match (disco::open(packet, &shared), from) {
            (Ok(Message::Ping { tx, .. }), Some(from)) => trusting.handle_ping(from, tx, now),
            (Ok(Message::Pong { tx, .. }), Some(_)) => trusting.handle_pong(tx, now),
            (Ok(Message::CallMeMaybe { endpoints }), None) => {
                // Each call is handled beside the others.
                let late = Duration::from_micros(self.rng.random_range(0..=self.unordered));
                self.push(late, Delivery::Call { node: index, endpoints });
            }
            _ => {}
        }
        true
    }
}

impl World {
    /// A packet of the tunnel comes to the other end.
    pub(crate) fn admit_far(&mut self, index: usize, region: RegionId, mut packet: Vec<u8>) {
        let (sender, now) = (self.nodes[1 - index].public(), self.now);
        let node = &mut self.nodes[index];
        let admitted = node.engine.handle_derp(region, sender, &mut packet, now).map(|packet| number(packet));
        node.received.extend(admitted);
    }
}
