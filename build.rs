//! Has the linker pack the binary's relative relocations, where the C library at hand can read that.
//!
//! The loader writes a position-independent binary's pointers once, and so has the whole list of them in memory: 24
//! octets a pointer unpacked, a few bits packed (`DT_RELR`), a tenth of what an idle sidecar holds.

use std::env;
use std::process::Command;

/// The first glibc that reads packed relocations. Source: glibc, NEWS, 2.36.
const READS_PACKED: (u32, u32) = (2, 36);

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    let is_native = env::var("TARGET") == env::var("HOST");
    if is_native && glibc().is_some_and(|version| version >= READS_PACKED) {
        println!("cargo::rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
    }
}

/// The version of this machine's C library, if it is the one that is linked with.
fn glibc() -> Option<(u32, u32)> {
    if env::var("CARGO_CFG_TARGET_ENV").as_deref() != Ok("gnu") {
        return None;
    }
    let output = Command::new("getconf").arg("GNU_LIBC_VERSION").output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let (major, minor) = text.trim().strip_prefix("glibc ")?.split_once('.')?;
    Some((major.parse().ok()?, minor.split('.').next()?.parse().ok()?))
}
