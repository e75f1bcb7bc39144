//! tailcar.

pub mod key;
pub mod wire;
pub mod netmap;
pub mod dns;
pub mod engine;
pub mod netstack;
pub mod transport;
pub mod control;
pub mod node;
pub mod fault;
pub mod proxy;
