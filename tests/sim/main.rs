//! The pure engine against modelled networks, in virtual time.
//!
//! [`world`] is two engines and what lies between them; [`paths`] generates networks and what happens to them, and
//! checks what comes of it against a plain model; [`recovery`] is how long a change interrupts a conversation;
//! [`interruption`] is the same where the other end is Tailscale's client; [`meeting`] is how soon two nodes meet.

mod control;
mod echo;
mod far;
mod interruption;
mod meeting;
mod nat;
mod node;
mod paths;
mod recovery;
mod relays;
mod trusting;
mod weather;
mod world;
