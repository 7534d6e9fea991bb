//! Makes cargo notice new migration files: the macro that embeds them only tracks those it has seen.

fn main() {
    println!("cargo:rerun-if-changed=schema/migrations");
}
