//! What tests of the data plane stand on: a core that is connected to nobody.

use std::rc::Rc;
use std::time::Instant;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};

use super::core::{Core, Parts};
use super::outbox::Outbox;
use super::relays::{Dialler, Relays};
use crate::engine::{Config, Engine, Transport};
use crate::key::{DiscoPrivate, NodePrivate};
use crate::netstack::Netstack;
use crate::transport::bed::underlay;
use crate::transport::link::Link;
use crate::transport::udp::Udp;

/// What makes a netstack's ports and sequence numbers.
pub(super) const SEED: u64 = 1;

/// A core with sockets of its own and no netmap, which uses no relay.
pub(super) fn core(now: Instant) -> Core {
    let (node_key, disco_key) = (NodePrivate::random(), DiscoPrivate::random());
    let transport = Transport::Direct;
    let underlay = underlay(Link::default());
    let dialler = Dialler { key: node_key.clone(), underlay: underlay.clone(), tasks: mpsc::unbounded_channel().0 };
    Core::new(Parts {
        engine: Engine::new(Config { node_key, disco_key, seed: [1; 32], transport }, now),
        netstack: Netstack::new(SEED, now),
        outbox: Outbox::new(Some(Rc::new(Udp::bind().unwrap()))),
        relays: Relays::new(dialler),
        underlay,
        control: tokio::runtime::Handle::current(),
        probes: mpsc::channel(1).0,
        report: watch::Sender::default(),
    })
}

/// Two ends of a connection over loopback: the one that dialled first.
pub(super) async fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let dialled = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    (dialled, listener.accept().await.unwrap().0)
}
