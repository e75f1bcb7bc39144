//! tailcar.

pub mod control;
pub mod dns;
pub mod engine;
pub mod fault;
pub mod key;
pub mod netmap;
pub mod netstack;
pub mod node;
pub mod proxy;
pub mod transport;
pub mod wire;
