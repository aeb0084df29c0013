//! `angler completions` and `angler man`: the commands and flags, for shells and for `man`. Both are made from the
//! definitions that parse them, so they cannot tell of others.

use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Args, CommandFactory, ValueEnum};

use super::Cli;

/// Print a completion script for a shell
///
/// bash: angler completions bash > ~/.local/share/bash-completion/completions/angler
///
/// zsh: angler completions zsh > FOLDER/_angler, where FOLDER is one of $fpath
///
/// fish: angler completions fish > ~/.config/fish/completions/angler.fish
#[derive(Args)]
#[command(verbatim_doc_comment)]
pub struct CompletionsCommand {
    /// The shell that reads it
    shell: Shell,
}

#[derive(Clone, Copy, ValueEnum)]
enum Shell {
    Bash,
    Zsh,
    Fish,
}

impl CompletionsCommand {
    pub(super) fn run(&self) -> Result<()> {
        let shell = match self.shell {
            Shell::Bash => clap_complete::Shell::Bash,
            Shell::Zsh => clap_complete::Shell::Zsh,
            Shell::Fish => clap_complete::Shell::Fish,
        };
        // Into memory first: its writer panics where a pipe is closed early, as by `| head`.
        let mut script = Vec::new();
        clap_complete::generate(shell, &mut Cli::command(), "angler", &mut script);
        std::io::stdout().write_all(&script).context("the script cannot be written")
    }
}

/// Write man pages, one a command, into a folder
///
/// For `man angler` and `man angler-classes-build`: angler man ~/.local/share/man/man1
#[derive(Args)]
pub struct ManCommand {
    /// The folder; it is made if it is missing
    folder: PathBuf,
}

impl ManCommand {
    pub(super) fn run(&self) -> Result<()> {
        let folder = self.folder.display().to_string();
        std::fs::create_dir_all(&self.folder)
            .and_then(|()| clap_mangen::generate_to(Cli::command(), &self.folder))
            .with_context(|| format!("man pages cannot be written into {folder}"))
    }
}
