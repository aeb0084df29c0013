//! Parse, run, map the error to an exit code: 0 done, 1 it failed, 2 wrong usage or settings.

use std::process::ExitCode;

use angler::cli::Cli;
use clap::Parser;

fn main() -> ExitCode {
    // Wrong usage ends in clap with code 2.
    angler::cli::main(Cli::parse())
}
