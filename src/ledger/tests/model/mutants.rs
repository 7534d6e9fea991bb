//! Proof that the walk can fail: faults put into the SQL, or into what the workers do, each of which it must find.

use super::super::world::{World, in_world};
use super::Rule;

/// What workers do wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Habit {
    /// Nothing.
    Good,
    /// Nothing, but they park nothing at once: that would leave fewer chances to find faults elsewhere.
    Admits,
    /// Nothing, and they park at once whatever is new: faults of that are found within few walks.
    Parks,
    /// Nothing, but they often lose to each other what they hold.
    Robbed,
    /// They acknowledge before the settlement is written.
    AcksFirst,
    /// They write without asking whether they may still.
    NeverAsks,
    /// They do not mark the final write of jobs that are to be held.
    NeverMarks,
    /// They clear the outbox, then publish.
    ClearsFirst,
}

/// Walks tried until one finds the fault: mostly one of the first. On a busy machine slots run out before they are used, and
/// less happens in each.
const TRIES: u64 = 40;
const STEPS: usize = 300;

/// Puts `to` in the place of `from` in one of the functions.
async fn mutate(world: &World, function: &str, changes: &[(&str, &str)]) {
    let sql = "SELECT pg_get_functiondef(p.oid) FROM pg_proc p JOIN pg_namespace n ON n.oid = p.pronamespace
               WHERE p.proname = $1 AND n.nspname = $2";
    let client = world.db.client().await.unwrap();
    let schema = world.db.sql("{s}");
    let schema = schema.trim_matches('"');
    let row = client.query_one(sql, &[&function, &schema]).await.unwrap();
    let mut text: String = row.get(0);
    for (from, to) in changes {
        assert!(
            text.contains(from),
            "{function} says no longer: {from}\nAdapt the mutation to the present text:\n{text}"
        );
        text = text.replace(from, to);
    }
    let text = format!("SET search_path TO {schema}; {text}; RESET search_path");
    client.batch_execute(&text).await.unwrap();
}

/// The first rule that a walk with this fault breaks.
async fn found(function: &str, changes: &[(&str, &str)], habit: Habit) -> Option<Rule> {
    for seed in 0..TRIES {
        let mut rule = None;
        let walk = in_world(async |world| {
            if !function.is_empty() {
                mutate(&world, function, changes).await;
            }
            if let Err((broken, trace)) = Box::pin(super::walk(world, 100 + seed, STEPS, habit)).await {
                eprintln!("{trace}\n{broken}");
                rule = Some(broken.rule);
            }
        });
        Box::pin(walk).await;
        if rule.is_some() {
            return rule;
        }
    }
    None
}

macro_rules! mutants {
    ($($name:ident: $function:literal [$($from:literal => $to:literal),+] breaks $($rule:ident)|+;)+) => {$(
        #[tokio::test]
        async fn $name() {
            let habit = if $function == "park_new_v1" { Habit::Parks } else { Habit::Admits };
            let found = found($function, &[$(($from, $to)),+], habit).await;
            assert!(matches!(found, Some($(Rule::$rule)|+)), "{found:?}");
        }
    )+};
}

mutants! {
    takeover_keeps_the_claim:
        "takeover_v1" ["claim = NULL, " => ""]
        breaks LeaseGuards | AcceptedStays | NothingLost;
    takeover_takes_from_the_living:
        "takeover_v1" ["w.heartbeat_at < v_now - greatest(w.lease, p_lease)" => "true", "z.heartbeat_at < v_now - greatest(z.lease, p_lease)" => "true"]
        breaks DeadStayDead;
    takeover_by_those_who_are_silent_themselves:
        "takeover_v1" ["w.heartbeat_at > v_now - p_lease" => "true", "NOT w.dead AND true" => "true"]
        breaks DeadStayDead;
    takeover_leaves_bodies_to_the_broker:
        "takeover_v1" ["CASE WHEN x.body IS NULL THEN 0 ELSE 2 END" => "0"]
        breaks NothingLost;
    takeover_moves_what_may_have_been_sent:
        "takeover_v1" [" AND x.phase = 0\n" => "\n"]
        breaks SentOnce;
    heartbeats_revive_the_dead:
        "heartbeat_v1" [" AND NOT dead" => "", "UPDATE worker SET" => "UPDATE worker SET dead = false,"]
        breaks DeadStayDead;
    settling_without_the_lease:
        "settle_v1" ["AND x.epoch IS NOT DISTINCT FROM p_epoch AND x.claim = u.c" => ""]
        breaks LeaseGuards;
    settling_forgets_who_was_accepted:
        "settle_v1" ["coalesce(u.rc::jsonb, x.recipients)" => "u.rc::jsonb"]
        breaks AcceptedStays;
    settling_over_a_cancel:
        "settle_v1" [" AND NOT (x.cancel AND u.k IN (2, 3))" => ""]
        breaks CancelStands | SlotsCounted;
    settling_keeps_the_slot:
        "settle_v1" ["phase = 0, slot_at = NULL, slot_cost = NULL,\n            attempt" => "phase = 0,\n            attempt"]
        breaks SlotsCounted;
    settling_owes_only_what_ends_a_job:
        "settle_v1" ["FROM hit h WHERE h.rp IS NOT NULL" => "FROM hit h WHERE h.rp IS NOT NULL AND h.state = 3"]
        breaks ReportsOwed;
    settling_tells_another_number:
        "settle_v1" ["array_agg(h.n)" => "array_agg(h.n - 1)"]
        breaks ReportsOwed;
    the_outbox_is_cleared_up_to_a_number:
        "clear_outbox_v1" ["x.n = ANY (p_numbers)" => "x.n <= ANY (p_numbers)"]
        breaks ReportsOwed;
    absorbing_stores_nothing:
        "absorb_v1" ["j.state IN (1, 4) AND j.empty" => "false"]
        breaks NothingLost;
    absorbing_what_was_given_back:
        "absorb_v1" ["IF j.state = 0 THEN" => "IF false THEN"]
        breaks NothingLost;
    admitting_what_is_leased:
        "admit_v1" ["v_own OR j.state IN (0, 5)" => "v_own OR j.state IN (0, 1, 5)"]
        breaks OneOwner | LeaseGuards;
    admitting_what_waits:
        "admit_v1" ["v_own OR j.state IN (0, 5)" => "v_own OR j.state IN (0, 2, 5)"]
        breaks LanesRight;
    admitting_what_is_final:
        "admit_v1" ["v_own OR j.state IN (0, 5)" => "v_own OR j.state IN (0, 3, 5)"]
        breaks FinalStays;
    marking_without_the_lease:
        "mark_data_v1" ["AND x.epoch IS NOT DISTINCT FROM p_epoch AND x.claim = u.c" => ""]
        breaks LeaseGuards;
    slots_without_the_lease:
        "slots_v1" ["x.state = 1 AND x.epoch = p_epoch AND x.claim = u.c" => "true"]
        breaks SlotsCounted;
    slots_beyond_a_limit_of_recipients:
        "share_slots" ["v_m[p] < 1 OR v_r[p] < c" => "v_m[p] < 1"]
        breaks WithinLimits;
    slots_beyond_a_limit_at_once:
        "take_slots" ["bool_and(q.fits)" => "true"]
        breaks WithinLimits;
    slots_given_back_to_nobody:
        "refund_slots" ["r.used[l] := r.used[l] - c" => "c := 0"]
        breaks SlotsCounted;
    slots_given_back_twice:
        "refund_slots" ["r.used[l] := r.used[l] - c" => "r.used[l] := r.used[l] - 2 * c"]
        breaks SlotsCounted;
    releasing_without_counting:
        "release_v1" ["fifo = greatest(z.fifo - u.fifo, 0)" => "fifo = z.fifo"]
        breaks LanesRight;
    parking_without_a_lane:
        "touch_lanes" ["fifo = l.fifo + excluded.fifo" => "fifo = excluded.fifo"]
        breaks LanesRight;
    parking_in_a_lane_that_sleeps:
        "touch_lanes" ["next_at = least(l.next_at, excluded.next_at)" => "next_at = l.next_at + interval '1 hour'"]
        breaks LanesRight;
    parking_at_once_without_a_lane:
        "park_new_v1" ["FROM made m\n        GROUP BY" => "FROM made m WHERE m.o > 1\n        GROUP BY"]
        breaks LanesRight;
    parking_at_once_in_a_lane_that_sleeps:
        "park_new_v1" ["next_at = least(l.next_at, excluded.next_at)" => "next_at = l.next_at + interval '1 hour'"]
        breaks LanesRight;
    parking_at_once_owes_nothing:
        "park_new_v1" ["FROM made m WHERE m.n IS NOT NULL" => "FROM made m WHERE m.o > 1"]
        breaks ReportsOwed;
    parking_at_once_tells_another_number:
        "park_new_v1" ["array_agg(m.n)" => "array_agg(m.n - 1)"]
        breaks ReportsOwed;
}

#[tokio::test]
async fn acknowledging_before_the_commit() {
    let habit = Habit::AcksFirst;
    assert_eq!(found("", &[], habit).await, Some(Rule::NothingLost));
}

#[tokio::test]
async fn writing_without_asking() {
    let habit = Habit::NeverAsks;
    let found = found("", &[], habit).await;
    assert!(
        matches!(found, Some(Rule::SentOnce | Rule::AcceptedStays)),
        "{found:?}"
    );
}

#[tokio::test]
async fn holding_without_a_mark() {
    let habit = Habit::NeverMarks;
    assert_eq!(found("", &[], habit).await, Some(Rule::SentOnce));
}

#[tokio::test]
async fn clearing_before_publishing() {
    let habit = Habit::ClearsFirst;
    assert_eq!(found("", &[], habit).await, Some(Rule::ReportsOwed));
}

#[tokio::test]
async fn settling_over_a_merged_acceptance() {
    let blind = [
        ("(NOT x.merged OR u.k = 4)", "true"),
        (
            "CASE WHEN x.merged THEN with_acceptances(",
            "CASE WHEN false THEN with_acceptances(",
        ),
    ];
    let found = found("settle_v1", &blind, Habit::Robbed).await;
    assert!(matches!(found, Some(Rule::AcceptedStays)), "{found:?}");
}
