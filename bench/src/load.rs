//! What is measured, by the letters of docs/benchmarks.md.

use crate::contestant::Contestant;
use crate::produce::Jobs;
use crate::sink::Mode;

/// How a run goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// All jobs are there before the contestant starts; the rate is from the first mail to the last.
    Backlog,
    /// All jobs are parked first, then due at once: two rates.
    Parked,
    /// One job at a time, with pauses: how long from publishing to the sink.
    OneByOne,
    /// Reports instead of jobs, all there before the bridge starts; the rate is that of webhooks.
    Webhooks,
}

/// One run, repeated in each round.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    /// What is special about it, besides the contestant.
    pub(crate) what: &'static str,
    pub(crate) contestant: Contestant,
    pub(crate) connections: usize,
    pub(crate) mode: Mode,
    pub(crate) jobs: Jobs,
    pub(crate) way: Way,
    pub(crate) slow_commits: bool,
    /// Accounts of others that are in trouble meanwhile.
    pub(crate) trouble: u32,
}

/// Entries that are compared with each other; the first is what the others are compared with.
#[derive(Debug, Clone)]
pub(crate) struct Load {
    pub(crate) letter: char,
    pub(crate) title: &'static str,
    pub(crate) entries: Vec<Entry>,
}

const POSTROOM: Contestant = Contestant::Postroom(1);
const PIPELINING: Mode = Mode {
    delay_ms: 0,
    pipelining: true,
    chunking: false,
};
const CHUNKING: Mode = Mode {
    delay_ms: 0,
    pipelining: true,
    chunking: true,
};
const BARE: Mode = Mode {
    delay_ms: 0,
    pipelining: false,
    chunking: false,
};

/// As most servers are.
fn entry(contestant: Contestant, count: usize) -> Entry {
    Entry {
        what: "",
        contestant,
        connections: 16,
        mode: BARE,
        jobs: Jobs {
            count,
            ..Jobs::default()
        },
        way: Way::Backlog,
        slow_commits: false,
        trouble: 0,
    }
}

impl Entry {
    fn what(self, what: &'static str) -> Self {
        Self { what, ..self }
    }

    fn mode(self, mode: Mode) -> Self {
        Self { mode, ..self }
    }

    fn delayed(self, delay_ms: u64) -> Self {
        Self {
            mode: Mode {
                delay_ms,
                ..self.mode
            },
            ..self
        }
    }

    fn way(self, way: Way) -> Self {
        Self { way, ..self }
    }

    fn jobs(mut self, change: impl FnOnce(&mut Jobs)) -> Self {
        change(&mut self.jobs);
        self
    }
}

/// The loads of `make bench`, or all of them.
pub(crate) fn all(full: bool) -> Vec<Load> {
    let mut loads = vec![zero_latency(), limits(), parked(full), idle()];
    loads.extend(latency());
    if full {
        loads.extend([
            accounts(),
            tls(),
            recipients(),
            deferred(),
            workers(),
            slow_commits(),
            webhooks(),
        ]);
        loads.extend(sizes());
    }
    loads.sort_by_key(|load| load.letter);
    loads
}

fn zero_latency() -> Load {
    Load {
        letter: 'a',
        title: "no latency, 1 account, 16 connections",
        entries: vec![
            entry(Contestant::Plain, 20_000),
            entry(POSTROOM, 20_000).what("server offers neither extension"),
            entry(POSTROOM, 20_000).mode(PIPELINING).what("PIPELINING"),
            entry(POSTROOM, 20_000)
                .mode(CHUNKING)
                .what("PIPELINING, CHUNKING"),
            entry(Contestant::Nodemailer, 5_000),
            entry(Contestant::Smtplib, 2_000),
            entry(Contestant::Pool, 1_000),
        ],
    }
}

fn latency() -> Vec<Load> {
    let load = |title, delay, count: usize| Load {
        letter: 'b',
        title,
        entries: vec![
            entry(Contestant::Plain, count).delayed(delay),
            entry(POSTROOM, count)
                .delayed(delay)
                .what("server offers neither extension"),
            entry(POSTROOM, 2 * count)
                .mode(PIPELINING)
                .delayed(delay)
                .what("PIPELINING"),
            entry(POSTROOM, 4 * count)
                .mode(CHUNKING)
                .delayed(delay)
                .what("PIPELINING, CHUNKING"),
        ],
    };
    vec![
        load("20 ms per reply, 16 connections", 20, 960),
        load("100 ms per reply, 16 connections", 100, 240),
    ]
}

fn accounts() -> Load {
    let with = |count, what| {
        entry(POSTROOM, 20_000)
            .what(what)
            .jobs(|jobs| jobs.accounts = count)
    };
    Load {
        letter: 'c',
        title: "1, 10, 1000 accounts without limits",
        entries: vec![
            with(1, "1 account"),
            with(10, "10 accounts"),
            with(1000, "1000 accounts"),
        ],
    }
}

fn limits() -> Load {
    let mut usual = entry(POSTROOM, 20_000)
        .what("1000 accounts, 3 limits each, jobs that expire, 100 others in trouble")
        .jobs(|jobs| {
            jobs.tenants = "many-limits";
            jobs.accounts = 1000;
            jobs.expiring = true;
        });
    usual.trouble = 100;
    let limited = |accounts, count, what| {
        entry(POSTROOM, count).what(what).jobs(|jobs| {
            jobs.tenants = "limited";
            jobs.accounts = accounts;
        })
    };
    Load {
        letter: 'd',
        title: "limits on",
        entries: vec![
            entry(POSTROOM, 20_000).what("1 account without limits"),
            limited(1, 20_000, "1 limited account"),
            limited(1000, 20_000, "1000 limited accounts"),
            // Connections are opened once; five times the mails show what limits cost when they are.
            limited(1000, 100_000, "1000 limited accounts, 100 mails each"),
            usual,
        ],
    }
}

fn sizes() -> Vec<Load> {
    let load = |title, text, pdf, count| {
        let sized = |contestant| {
            entry(contestant, count).jobs(|jobs| {
                jobs.text = text;
                jobs.pdf = pdf;
            })
        };
        Load {
            letter: 'e',
            title,
            entries: vec![
                sized(Contestant::Plain),
                sized(POSTROOM),
                sized(POSTROOM).mode(CHUNKING).what("CHUNKING"),
            ],
        }
    };
    vec![
        load("invoices: HTML of 30 KB, a PDF of 100 KB", 30_000, 100_000, 2_000),
        load("mails of 100 KB", 100_000, 0, 2_000),
        load("mails of 5 MB", 5_000_000, 0, 60),
    ]
}

fn tls() -> Load {
    let tls = |contestant| entry(contestant, 20_000).jobs(|jobs| jobs.tenants = "tls");
    Load {
        letter: 'f',
        title: "TLS and login",
        entries: vec![tls(Contestant::Plain), tls(POSTROOM)],
    }
}

fn recipients() -> Load {
    let ten = |contestant| entry(contestant, 5_000).jobs(|jobs| jobs.recipients = 10);
    Load {
        letter: 'g',
        title: "10 recipients per mail",
        entries: vec![
            ten(Contestant::Plain),
            ten(POSTROOM),
            ten(POSTROOM).mode(PIPELINING).what("PIPELINING"),
        ],
    }
}

fn deferred() -> Load {
    let deferred = |count| entry(POSTROOM, count).jobs(|jobs| jobs.deferred = true);
    Load {
        letter: 'h',
        title: "half of the mails are put off once",
        entries: vec![
            entry(POSTROOM, 10_000).what("none is"),
            deferred(10_000).what("10 000 jobs"),
            deferred(20_000).what("20 000 jobs"),
        ],
    }
}

fn parked(full: bool) -> Load {
    let parked = |count| {
        entry(POSTROOM, count)
            .way(Way::Parked)
            .jobs(|jobs| jobs.parked = true)
    };
    let mut entries = vec![
        entry(POSTROOM, 20_000).what("from the queue"),
        parked(20_000).what("parked, 20 000"),
    ];
    if full {
        entries.push(parked(200_000).what("parked, 200 000"));
        entries.push(parked(1_000_000).what("parked, 1 000 000"));
    }
    Load {
        letter: 'i',
        title: "parking, and drain of what is due at once",
        entries,
    }
}

fn idle() -> Load {
    let single = |contestant| entry(contestant, 150).way(Way::OneByOne);
    Load {
        letter: 'j',
        title: "idle: from publishing to the sink",
        entries: vec![single(Contestant::Plain), single(POSTROOM)],
    }
}

fn workers() -> Load {
    let entries = [1, 2, 4].map(|workers| entry(Contestant::Postroom(workers), 30_000));
    Load {
        letter: 'k',
        title: "several workers, 16 connections each",
        entries: entries.to_vec(),
    }
}

fn slow_commits() -> Load {
    let slow = Entry {
        slow_commits: true,
        ..entry(POSTROOM, 20_000)
    };
    Load {
        letter: 'l',
        title: "commits that take 2 ms longer",
        entries: vec![
            entry(POSTROOM, 20_000).what("as they are"),
            slow.what("2 ms longer"),
        ],
    }
}

fn webhooks() -> Load {
    let bridge = |per_endpoint, tenants| {
        entry(Contestant::Bridge(per_endpoint), 20_000)
            .way(Way::Webhooks)
            .jobs(|jobs| jobs.accounts = tenants)
    };
    Load {
        letter: 'm',
        title: "reports to webhooks",
        entries: vec![
            bridge(4, 1000).what("1000 endpoints"),
            bridge(4, 10).what("10 endpoints"),
            bridge(4, 1).what("1 endpoint, 4 POSTs at once"),
            bridge(64, 1).what("1 endpoint, 64 POSTs at once"),
            bridge(4, 1000)
                .delayed(20)
                .what("1000 endpoints, 20 ms per answer"),
        ],
    }
}
