//! What statements read, as the server counts it: for tests of calls that must not read the whole of a large table.

use super::Database;

/// Rows and index entries that the tables of the schema have had read since the beginning. Complete if the pool has only one
/// connection: counts are reported by the connection that reads.
pub(crate) async fn rows_read(database: &Database) -> i64 {
    let client = database.client().await.unwrap();
    client
        .batch_execute("SELECT pg_stat_force_next_flush()")
        .await
        .unwrap();
    let sql = database.sql(
        "SELECT sum(t.seq_tup_read
                    + coalesce((SELECT sum(i.idx_tup_read) FROM pg_stat_user_indexes i WHERE i.relid = t.relid), 0))::bigint
         FROM pg_stat_user_tables t JOIN pg_class c ON c.oid = t.relid
         WHERE c.relnamespace = (SELECT relnamespace FROM pg_class WHERE oid = '{s}.job'::regclass)",
    );
    client.query_one(&sql, &[]).await.unwrap().get(0)
}

/// The server learns nothing about the tables of the schema by itself any more.
pub(crate) async fn never_analyzed(database: &Database) {
    for_each_table(database, "ALTER TABLE %s SET (autovacuum_enabled = off)").await;
}

/// The server looks at the tables of the schema as they are now.
pub(crate) async fn analyze(database: &Database) {
    for_each_table(database, "ANALYZE %s").await;
}

async fn for_each_table(database: &Database, statement: &str) {
    let sql = database.sql(&format!(
        "DO $$ DECLARE t record; BEGIN
             FOR t IN SELECT oid::regclass AS name FROM pg_class
                      WHERE relkind = 'r' AND relnamespace = (SELECT relnamespace FROM pg_class WHERE oid = '{{s}}.job'::regclass) LOOP
                 EXECUTE format('{statement}', t.name);
             END LOOP;
         END $$"
    ));
    database
        .client()
        .await
        .unwrap()
        .batch_execute(&sql)
        .await
        .unwrap();
}
