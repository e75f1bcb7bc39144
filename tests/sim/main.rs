//! The pure engine against modelled networks, in virtual time.
//!
//! [`world`] is two engines and what lies between them; [`paths`] generates networks and what happens to them, and
//! checks what comes of it against a plain model; [`recovery`] is how long a change interrupts a conversation;
//! [`meeting`] is how soon two nodes meet.

mod control;
mod meeting;
mod nat;
mod node;
mod paths;
mod recovery;
mod weather;
mod world;
