//! The view for autoscaling: waiting jobs that could run now.

use std::time::Duration;

use super::releasing::fill;
use super::world::{World, in_world, park, request};
use crate::ledger::WaitReason;
use crate::level::Level;

/// Lanes and jobs of the view, most urgent level first.
async fn runnable(world: &World) -> Vec<(String, i64, i64)> {
    let sql = world.db.sql("SELECT level, lanes, jobs FROM {s}.runnable_jobs");
    let rows = world.db.client().await.unwrap().query(&sql, &[]).await.unwrap();
    rows.iter()
        .map(|row| (row.get(0), row.get(1), row.get(2)))
        .collect()
}

#[tokio::test]
async fn the_view_of_runnable_jobs_counts_what_could_run_now() {
    in_world(|world| async move {
        let row = |level: Level, lanes, jobs| (level.to_string(), lanes, jobs);
        let levels =
            |low, medium| [row(Level::Immediate, 0, 0), row(Level::High, 0, 0), medium, low].to_vec();
        let (no_low, no_medium) = (row(Level::Low, 0, 0), row(Level::Medium, 0, 0));
        assert_eq!(runnable(&world).await, levels(no_low, no_medium.clone()));

        fill(&world, "a", "a/main", Level::Low, 3, 1).await;
        fill(&world, "b", "b/main", Level::Low, 2500, 1).await;
        assert_eq!(
            runnable(&world).await,
            levels(row(Level::Low, 2, 1003), no_medium.clone()),
            "at most a thousand per lane"
        );

        // What waits for its time does not count.
        let epoch = world.epoch().await;
        let later = world.go(request(&epoch, "later", "1")).await;
        world
            .settle_one(park(&later, WaitReason::Schedule, Duration::from_mins(5)))
            .await;
        assert_eq!(
            runnable(&world).await,
            levels(row(Level::Low, 2, 1003), no_medium.clone())
        );

        // Limits leave room for so many; a shared account's limit binds all its tenants together.
        world.limit("b/", &[(20, 60_000_000, "messages")]).await;
        world.limit("-/shared", &[(5, 60_000_000, "messages")]).await;
        fill(&world, "c", "-/shared", Level::Medium, 4, 1).await;
        fill(&world, "d", "-/shared", Level::Medium, 4, 1).await;
        assert_eq!(
            runnable(&world).await,
            levels(row(Level::Low, 2, 23), row(Level::Medium, 2, 5))
        );

        // A limit that is used up leaves none.
        let released = world.release(&epoch, Level::Medium, 8).await;
        assert_eq!(released.len(), 5);
        let (_, _, jobs) = runnable(&world).await[2].clone();
        assert_eq!(jobs, 0);
    })
    .await;
}

#[tokio::test]
async fn a_role_that_works_with_the_schema_may_look_at_runnable_jobs() {
    in_world(|world| async move {
        let role = format!("r_{}", uuid::Uuid::new_v4().simple());
        world.run(&format!("CREATE ROLE {role}")).await;
        world
            .run(&format!(
                "GRANT USAGE ON SCHEMA {{s}} TO {role}; GRANT SELECT ON ALL TABLES IN SCHEMA {{s}} TO {role};
                 BEGIN; SET LOCAL ROLE {role}; SELECT sum(jobs) FROM {{s}}.runnable_jobs; COMMIT;
                 DROP OWNED BY {role}; DROP ROLE {role}"
            ))
            .await;
    })
    .await;
}

#[tokio::test]
async fn a_role_that_may_only_read_the_view_sees_the_runnable_jobs() {
    in_world(|world| async move {
        fill(&world, "a", "a/main", Level::Low, 3, 1).await;
        let role = format!("r_{}", uuid::Uuid::new_v4().simple());
        world
            .run(&format!(
                "CREATE ROLE {role}; GRANT USAGE ON SCHEMA {{s}} TO {role}; GRANT SELECT ON {{s}}.runnable_jobs TO {role}"
            ))
            .await;
        let client = world.db.client().await.unwrap();
        // Tables of its own under the ledger's names are not what is read with the owner's rights.
        let become_it = format!(
            "BEGIN; SET LOCAL ROLE {role}; CREATE TEMP TABLE rate ();
             CREATE TEMP TABLE lane (account text, level int2, tenant text, next_at timestamptz, oldest_at timestamptz)"
        );
        client.batch_execute(&become_it).await.unwrap();
        let sum = world.db.sql("SELECT sum(jobs)::bigint FROM {s}.runnable_jobs");
        assert_eq!(client.query_one(&sum, &[]).await.unwrap().get::<_, i64>(0), 3);
        let table = world.db.sql("SELECT count(*) FROM {s}.lane");
        let error = client.query_one(&table, &[]).await.unwrap_err();
        assert_eq!(error.code().unwrap().code(), "42501", "{error}");
        client
            .batch_execute(&format!("ROLLBACK; DROP OWNED BY {role}; DROP ROLE {role}"))
            .await
            .unwrap();
    })
    .await;
}
