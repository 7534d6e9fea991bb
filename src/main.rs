//! The `postroom` binary: memory, cryptography, arguments, logs, then the command.

use std::process::ExitCode;

use postroom::cli::Invocation;

fn main() -> ExitCode {
    postroom::secret::dumps::forbid();
    // One provider for every TLS connection. It fails only if there is one already, and nothing ran before this.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let invocation = match Invocation::parse(std::env::args_os()) {
        Ok(invocation) => invocation,
        Err(exit_code) => return exit_code,
    };
    #[cfg(feature = "fail-points")]
    if let Err(error) = postroom::fail_point::arm() {
        eprintln!("postroom: {error}");
        return ExitCode::from(2);
    }
    invocation.start_logging();
    postroom::shutdown::block_on(invocation.run()).unwrap_or_else(|error| {
        tracing::error!(%error, "cannot start the runtime");
        ExitCode::FAILURE
    })
}
