//! What the tools of the field have to say: TypeScript's compiler of the types, Squawk of the migrations, `plpgsql_check` of the
//! functions, Supabase's lints of the catalog. Each is also shown something that it must not pass.

mod functions;
mod lints;
mod migrations;
mod types;
