//! Parse, run, map the error to an exit code: 0 done, 1 it failed, 2 wrong usage or settings.

use std::process::ExitCode;

/// Read by ONNX Runtime when it is loaded. Without it version 1.32 looks up its maker's server and
/// keeps a file of events in the user's cache, whatever its own interface was told.
const NO_TELEMETRY: &str = "ORT_DISABLE_TELEMETRY";

fn main() -> ExitCode {
    if std::env::var_os(NO_TELEMETRY).is_none() {
        // SAFETY: there is no other thread yet that could read the environment.
        #[allow(unsafe_code, clippy::disallowed_methods)]
        unsafe {
            std::env::set_var(NO_TELEMETRY, "1");
        }
    }
    angler::commands::main(angler::commands::parse())
}
