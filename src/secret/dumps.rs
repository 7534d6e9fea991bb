//! What a process holds in memory (keys, passwords, mails) is not written to disk when it crashes, nor read by other
//! processes of the same user.

/// Forbids core dumps of this process, for good. On Linux also everything else that needs a dumpable process: attaching
/// a debugger as the same user, and reading its environment in `/proc`. What the system does not allow is left out.
pub fn forbid() {
    use rustix::process::{Resource, Rlimit, setrlimit};
    let none = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    let _ = setrlimit(Resource::Core, none);
    // The limit above does not hold for dumps that go to a program, which is what most distributions do.
    #[cfg(any(target_os = "linux", target_os = "android"))]
    let _ = rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_crash_leaves_no_dump() {
        forbid();
        let limit = rustix::process::getrlimit(rustix::process::Resource::Core);
        assert_eq!((limit.current, limit.maximum), (Some(0), Some(0)));
        #[cfg(any(target_os = "linux", target_os = "android"))]
        assert_eq!(
            rustix::process::dumpable_behavior().unwrap(),
            rustix::process::DumpableBehavior::NotDumpable
        );
    }
}
