use proptest::prelude::*;

use super::context::is_sampled;
use super::*;
use crate::telemetry::metrics::Metrics;

const PARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

fn metrics() -> Arc<Metrics> {
    Arc::new(Metrics::new().unwrap())
}

fn always() -> config::Sampler {
    config::Sampler {
        parent_based: true,
        ratio: 1.0,
    }
}

fn exporter(endpoint: &str, metrics: &Arc<Metrics>) -> Exporter {
    let config = config::Traces {
        endpoint: endpoint.to_owned().into(),
        headers: Vec::new(),
        timeout: Duration::from_mins(1),
        service_name: None,
        attributes: Vec::new(),
        sampler: always(),
    };
    Exporter::start(&config, "worker", Arc::clone(metrics)).unwrap()
}

fn summary() -> Summary {
    Summary {
        name: "work".into(),
        kind: Kind::Consumer,
        attributes: Attributes::default(),
        error: Some("refused".into()),
        failed_at: Some("send"),
    }
}

#[test]
fn a_traceparent_is_read_strictly_and_those_of_later_versions_too() {
    let read = Context::parse(PARENT).unwrap();
    assert!(read.sampled);
    assert_eq!(read.to_string(), PARENT);
    assert!(!Context::parse(&PARENT.replace("-01", "-00")).unwrap().sampled);
    assert!(!Context::parse(&PARENT.replace("-01", "-fe")).unwrap().sampled);
    let later = PARENT.replacen("00", "cc", 1);
    assert_eq!(Context::parse(&format!("{later}-more")), Some(read));
    for bad in [
        String::new(),
        format!("{PARENT}-more"),
        PARENT.replacen("00", "ff", 1),
        PARENT.to_uppercase(),
        PARENT.replace("4bf92f3577b34da6a3ce929d0e0e4736", &"0".repeat(32)),
        PARENT.replace("00f067aa0ba902b7", &"0".repeat(16)),
        PARENT.replace("-01", ""),
        PARENT.replace("-01", "-1"),
        PARENT.replace('b', "+"),
    ] {
        assert_eq!(Context::parse(&bad), None, "{bad}");
    }
}

#[test]
fn a_parents_flag_decides_unless_the_sampler_is_not_based_on_it() {
    let yes = Context::parse(PARENT);
    let no = Context::parse(&PARENT.replace("-01", "-00"));
    let trace = yes.unwrap().trace;
    for (parent_based, ratio, parent, expected) in [
        (true, 1.0, yes, true),
        (true, 1.0, no, false),
        (true, 1.0, None, true),
        (true, 0.0, yes, true),
        (true, 0.0, None, false),
        (false, 1.0, no, true),
        (false, 0.0, yes, false),
    ] {
        let sampler = config::Sampler { parent_based, ratio };
        assert_eq!(
            is_sampled(sampler, parent, trace),
            expected,
            "{sampler:?} {parent:?}"
        );
    }
}

#[test]
fn a_ratio_samples_about_that_share_of_traces() {
    let sampler = config::Sampler {
        parent_based: true,
        ratio: 0.25,
    };
    let traces = (0..10_000_u64).map(|n| {
        let random = n.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes();
        TraceId::from_random([random, random].concat().try_into().unwrap())
    });
    let count = traces.filter(|trace| is_sampled(sampler, None, *trace)).count();
    assert!((2300..2700).contains(&count), "{count}");
}

#[tokio::test]
async fn stages_are_children_of_the_work_and_the_last_of_the_failed_kind_is_marked() {
    let exporter = exporter("http://127.0.0.1:1", &metrics());
    let traces = Traces::new(always(), &exporter);
    let recording = traces.begin_below(PARENT).unwrap();
    let noted = Noted {
        stages: ["resolve", "send", "send"]
            .map(|name| Stage {
                name,
                from: recording.began,
                to: Instant::now(),
                server: None,
            })
            .into(),
        ..Noted::default()
    };
    let spans = recording.spans(noted, summary());
    let work = spans.last().unwrap();
    assert_eq!(work.name, "work");
    assert_eq!(
        format!(
            "{:032x}",
            u128::from_be_bytes(work.trace_id[..].try_into().unwrap())
        ),
        PARENT[3..35]
    );
    assert_eq!(
        format!(
            "{:016x}",
            u64::from_be_bytes(work.parent_span_id[..].try_into().unwrap())
        ),
        PARENT[36..52]
    );
    for stage in &spans[..3] {
        assert_eq!(
            (&stage.parent_span_id, &stage.trace_id),
            (&work.span_id, &work.trace_id)
        );
        assert!(stage.start_time_unix_nano >= work.start_time_unix_nano);
        assert!(stage.end_time_unix_nano <= work.end_time_unix_nano);
    }
    let marked: Vec<_> = spans.iter().map(|span| span.status.is_some()).collect();
    assert_eq!(marked, [false, false, true, true]);
}

#[tokio::test]
async fn of_very_many_stages_only_the_first_are_kept() {
    let exporter = exporter("http://127.0.0.1:1", &metrics());
    let traces = Traces::new(always(), &exporter);
    let recording = traces.begin(None, || TraceId::from_random([7; 16])).unwrap();
    let kept = follow(Some(recording), async {
        for _ in 0..10 * MAX_STAGES {
            stage("send", Instant::now());
        }
        CURRENT.with(|recording| recording.noted.borrow().stages.len())
    });
    assert_eq!(kept.await, MAX_STAGES);
}

#[tokio::test]
async fn work_that_is_not_followed_notes_nothing() {
    stage("send", Instant::now());
    server("mail.example.com", 25);
    summarise(|| unreachable!("nobody asked"));
    assert_eq!(follow(None, async { traceparent() }).await, None);
}

#[tokio::test]
async fn what_a_hanging_collector_leaves_no_room_for_is_dropped_and_counted() {
    // Connections are made by the system; nobody answers on them.
    let silent = tokio::net::TcpListener::bind(("127.0.0.1", 0)).await.unwrap();
    let metrics = metrics();
    let exporter = exporter(&format!("http://{}", silent.local_addr().unwrap()), &metrics);
    let traces = Traces::new(always(), &exporter);
    let dropped = metrics.trace_spans.with_label_values(&["dropped"]);
    let mut made = 0;
    while dropped.get() == 0 {
        let recording = traces.begin_below(PARENT).unwrap();
        recording.end(summary());
        made += 1;
        assert!(made < 100_000, "nothing is dropped");
        tokio::task::yield_now().await;
    }
    let began = Instant::now();
    exporter.finish(Duration::from_millis(200)).await;
    assert!(began.elapsed() < Duration::from_secs(20));
}

#[tokio::test]
async fn a_request_that_may_succeed_later_is_made_again_and_nothing_is_lost() {
    use postroom_testkit::collector::{Collector, Reply};
    let collector = Collector::start().await.unwrap();
    collector.always(Reply::Status(503));
    let metrics = metrics();
    let exporter = exporter(collector.url(), &metrics);
    let traces = Traces::new(always(), &exporter);
    traces.begin_below(PARENT).unwrap().end(summary());
    while collector.requests().len() < 2 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    collector.always(Reply::Take);
    exporter.finish(Duration::from_secs(20)).await;
    let count = |result| metrics.trace_spans.with_label_values(&[result]).get();
    assert_eq!((count("exported"), count("failed")), (1, 0));
    let requests = collector.requests();
    assert!(requests.len() > 1);
    assert!(requests.iter().all(|request| request.body == requests[0].body));
}

proptest! {
    #[test]
    fn no_traceparent_makes_it_panic(text in "\\PC*") {
        let _ = Context::parse(&text);
    }

    #[test]
    fn a_context_reads_back(trace in 1_u128.., span in 1_u64.., sampled: bool) {
        let text = format!("00-{trace:032x}-{span:016x}-{:02x}", u8::from(sampled));
        prop_assert_eq!(Context::parse(&text).unwrap().to_string(), text);
    }
}
