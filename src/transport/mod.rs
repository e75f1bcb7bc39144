//! Sockets: UDP to peers, TLS to control and to relays, and nothing else.

pub mod backoff;
#[cfg(test)]
pub(crate) mod bed;
pub mod derp;
pub mod error;
pub mod interfaces;
pub mod link;
pub mod places;
pub mod race;
pub mod tls;
pub mod turn;
pub mod udp;
pub mod underlay;
