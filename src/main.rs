//! `tailcar`: the command line, and nothing else.

use std::process::ExitCode;

fn main() -> ExitCode {
    tailcar::cli::main()
}
