//! tailcar: a sidecar for one run of a headless browser.
//!
//! It takes an ephemeral key, joins a tailnet as a userspace WireGuard node, resolves the names that only the tailnet
//! knows, gives the browser a SOCKS5 and HTTP proxy on loopback, and leaves when the run ends. What should go through
//! the tailnet and cannot, fails with a cause; it never goes out by the public internet.
//!
//! # The house
//! A module names only modules above it in this list; `tests/layers.rs` holds that, and keeps clock, network, runtime
//! and files out of the pure ones.
//!
//! | layer | module | what it is |
//! |---|---|---|
//! | 0 | [`key`] | who is who: one type a role, secrets redacted and wiped |
//! | 0 | [`lapse`] | how long something took, as a person reads it |
//! | 1 | [`wire`] | bytes and JSON to values and back, one file a protocol |
//! | 2 | [`netmap`] | what the tailnet looks like: peers and routes, one immutable value |
//! | 3 | [`dns`] | who decides a name |
//! | 3 | [`engine`] | WireGuard and magicsock: what to do with a packet |
//! | 3 | [`netstack`] | TCP and UDP inside the tunnel, one smoltcp `SocketSet` a flow |
//! | 4 | [`transport`] | UDP with GSO and GRO, DERP connections, TLS, the corporate proxy |
//! | 5 | [`control`] | the session with the control server: register, map, report, log out |
//! | 5 | [`provision`] | auth keys that are made first: by an OAuth client, or for a workload's own identity |
//! | 6 | [`node`] | the only place where the pure core meets sockets: driver, dial, resolve |
//! | 7 | [`fault`] | every failure that a user can meet, in one table |
//! | 8 | [`proxy`] | the way in for the browser |
//! | 10 | [`cli`] | argv, logging, exit codes; the only layer that prints |
//!
//! Layers 0 to 3 are pure and deterministic: `now` and a seed come in. Above them everything is async, on two threads:
//! the *data* thread carries UDP, DERP, WireGuard, the netstack and the proxy's connections on a local runtime; the
//! *control* thread speaks with control and resolvers.
//!
//! # Three paths
//! **A byte of a CONNECT to the wire and back.** [`proxy`] accepts, tells SOCKS5 from HTTP by the first byte and reads
//! the target; [`node::Node::dial`] waits until the node is in, lets [`dns::decide`] say who knows the name, keeps the
//! addresses that [`netmap::Netmap::route`] covers, and opens a flow in the [`netstack`]. The SYN leaves by
//! [`engine::Engine::handle_outbound`], which finds the peer, encrypts into the open GSO batch of its path and stages or
//! shakes hands where there is no session yet. What comes back is decrypted in place, checked for source and flow, and
//! given to the flow's socket alone. Only when the target has answered does the proxy say so.
//!
//! **A MapResponse to changed routes and names.** [`control`] cuts frames from the map stream,
//! [`netmap::session::Session`] makes each message a whole new [`netmap::Netmap`], a `watch` hands it to the driver (which
//! tells the engine) and to every dial, which borrows the newest.
//!
//! **A run's life.** [`cli`] binds the listeners, reads the key, starts the node, says ready, waits for a signal, the
//! child's end or a fatal answer, drains, logs out within its limit, and exits with a code that says what happened.

pub mod key;
pub mod lapse;

pub mod wire;

pub mod netmap;

pub mod dns;
pub mod engine;
pub mod netstack;

pub mod transport;

pub mod control;
pub mod provision;

pub mod node;

pub mod fault;

pub mod proxy;

pub mod cli;
