//! What processes use, from proc(5): CPU time and memory of a process with all its descendants.

use std::collections::HashMap;
use std::fs;

/// A process tree, by its root.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Tree(pub(crate) u32);

impl Tree {
    /// Who listens on this port of this machine. `None` if nobody visible does: a container, another machine.
    pub(crate) fn listening_on(port: u16) -> Option<Self> {
        let inodes: Vec<String> = ["/proc/net/tcp", "/proc/net/tcp6"]
            .iter()
            .filter_map(|table| fs::read_to_string(table).ok())
            .flat_map(|table| {
                table
                    .lines()
                    .filter_map(|line| listener(line, port))
                    .collect::<Vec<_>>()
            })
            .map(|inode| format!("socket:[{inode}]"))
            .collect();
        // The parent has a lower number than its children, as a rule; and the socket is the parent's.
        let mut pids = pids();
        pids.sort_unstable();
        let holds = |pid: &u32| {
            fs::read_dir(format!("/proc/{pid}/fd")).is_ok_and(|mut fds| {
                fds.any(|fd| {
                    let target = fd.and_then(|fd| fs::read_link(fd.path()));
                    target.is_ok_and(|target| inodes.iter().any(|inode| target.as_os_str() == inode.as_str()))
                })
            })
        };
        pids.into_iter().find(holds).map(Self)
    }

    fn members(self) -> Vec<u32> {
        let parents: HashMap<u32, u32> = pids()
            .into_iter()
            .filter_map(|pid| Some((pid, parent(pid)?)))
            .collect();
        let mut members = vec![self.0];
        let mut at = 0;
        while at < members.len() {
            let parent = members[at];
            members.extend(
                parents
                    .iter()
                    .filter(|(_, of)| **of == parent)
                    .map(|(pid, _)| *pid),
            );
            at += 1;
        }
        members
    }

    /// CPU seconds of all members, and of those that have ended and were waited for.
    pub(crate) fn cpu(self) -> f64 {
        self.members().into_iter().map(cpu).sum()
    }

    /// Sum of the members' peak resident memory, in MiB.
    pub(crate) fn peak_mib(self) -> f64 {
        self.members().into_iter().map(peak_mib).sum()
    }
}

fn pids() -> Vec<u32> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    let names = entries.flatten().map(|entry| entry.file_name());
    names.filter_map(|name| name.to_str()?.parse().ok()).collect()
}

/// The inode of a listening socket, if this line of /proc/net/tcp is one on the port.
fn listener(line: &str, port: u16) -> Option<String> {
    let mut fields = line.split_whitespace().skip(1);
    let local = fields.next()?;
    let state = fields.nth(1)?;
    let inode = fields.nth(5)?;
    let number = u16::from_str_radix(local.rsplit(':').next()?, 16).ok()?;
    (state == "0A" && number == port).then(|| inode.to_owned())
}

/// Fields of /proc/PID/stat behind the name, which may hold anything but ends with the last bracket.
fn stat(pid: u32) -> Option<Vec<String>> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    Some(
        text.rsplit_once(')')?
            .1
            .split_whitespace()
            .map(str::to_owned)
            .collect(),
    )
}

fn parent(pid: u32) -> Option<u32> {
    stat(pid)?.get(1)?.parse().ok()
}

fn cpu(pid: u32) -> f64 {
    let fields = stat(pid).unwrap_or_default();
    let ticks = fields
        .iter()
        .skip(11)
        .take(4)
        .filter_map(|ticks| ticks.parse::<f64>().ok());
    ticks.sum::<f64>() / rustix::param::clock_ticks_per_second() as f64
}

fn peak_mib(pid: u32) -> f64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status
        .lines()
        .find(|line| line.starts_with("VmHWM:"))
        .unwrap_or_default();
    let kib = line
        .split_whitespace()
        .nth(1)
        .and_then(|kib| kib.parse::<f64>().ok());
    kib.unwrap_or(0.0) / 1024.0
}
