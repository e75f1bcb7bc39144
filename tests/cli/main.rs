//! The built binary, met as a user meets it: bad input, signals, files; on loopback alone, without a tailnet.
//!
//! Every refusal is read three times (exit status, JSON line, human line), and no output may hold a secret.

#![expect(clippy::unwrap_used, reason = "a test says what it expects by failing")]

mod api;
mod control;
mod exec;
mod fake;
mod flags;
mod key;
mod life;
mod minted;
mod program;
