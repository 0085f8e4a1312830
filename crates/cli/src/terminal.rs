//! The terminal: its size, and raw mode that is always undone.

use std::io::IsTerminal;

use agentkernel_protocol::message::WindowSize;
use rustix::stdio;
use rustix::termios::{self, OptionalActions, Termios};

/// True if a person sits at both ends of the standard streams.
pub(crate) fn is_interactive() -> bool {
    std::io::stdin().is_terminal() && std::io::stdout().is_terminal()
}

/// Size of the terminal at standard output or input, or the customary one where there is none.
pub(crate) fn size() -> WindowSize {
    let size = termios::tcgetwinsize(stdio::stdout()).or_else(|_| termios::tcgetwinsize(stdio::stdin()));
    match size {
        Ok(size) if size.ws_row > 0 && size.ws_col > 0 => {
            WindowSize { rows: size.ws_row, columns: size.ws_col }
        }
        _ => WindowSize { rows: 24, columns: 80 },
    }
}

/// Raw mode of the terminal at standard input; dropping this restores what was.
pub(crate) struct RawMode {
    before: Termios,
}

impl RawMode {
    /// Enters raw mode; `None` if standard input is no terminal.
    pub(crate) fn enter() -> Option<Self> {
        let before = termios::tcgetattr(stdio::stdin()).ok()?;
        let mut raw = before.clone();
        raw.make_raw();
        termios::tcsetattr(stdio::stdin(), OptionalActions::Now, &raw).ok()?;
        Some(Self { before })
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        let _ = termios::tcsetattr(stdio::stdin(), OptionalActions::Now, &self.before);
    }
}
