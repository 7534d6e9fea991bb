//! placeholder
use crate::Failed;
#[derive(Debug, clap::Args)]
pub(crate) struct Options {}
pub(crate) fn run(_: &Options) -> Result<(), Failed> {
    Ok(())
}
