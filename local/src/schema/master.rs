//! `supabase/master_schema.sql`: the whole schema for Supabase's SQL editor, in one paste and one transaction.

use super::{SchemaFile, tables_of};

/// No dollar-quoted body of ours uses this tag.
const TAG: &str = "$trunkline_master$";

/// Writes the file. Pasted twice it does nothing the second time; on a project that has other tables of these names it refuses, names
/// them, and changes nothing; on a database that a migration made, it refuses too.
pub fn render(files: &[SchemaFile]) -> String {
    let tables: Vec<String> =
        files.iter().flat_map(|file| tables_of(&file.sql)).filter(|name| name.starts_with("public.")).collect();
    let names = tables.iter().map(|name| format!("'{}'", name.trim_start_matches("public."))).collect::<Vec<_>>();
    let names = wrapped(&names);
    let schema = whole(files);
    let version = fingerprint(&schema);
    assert!(!schema.contains(TAG), "a schema file uses the tag of the generated file");
    format!(
        r"-- Trunkline's whole schema, for Supabase's SQL editor: paste it and press Run. Made from schemas/ by `cargo run -p local -- generate`;
-- do not edit. One statement, so it is applied whole or not at all. Where the Supabase CLI is at hand, `supabase db push` is better: it
-- applies what is new and keeps a record.

do {TAG}
declare
  version   constant text := '{version}';
  installed text;
  clash     text;
begin
  select obj_description(oid, 'pg_namespace') into installed from pg_catalog.pg_namespace where nspname = 'private';
  if installed = 'Trunkline ' || version then
    raise notice 'Trunkline % is here already: nothing to do.', version;
    return;
  end if;
  select string_agg(relname, ', ' order by relname) into clash
  from pg_catalog.pg_class
  where relnamespace = 'public'::regnamespace
    and relkind in ('r', 'p', 'v', 'm')
    and relname in (
{names}
    );
  if installed like 'Trunkline %' then
    raise exception 'another version of Trunkline is installed here (%); apply supabase/migrations with `supabase db push` instead', installed;
  elsif clash is not null then
    raise exception 'this project has other tables of the same names: %. Nothing was changed.', clash
      using hint = 'Install Trunkline into a project of its own, or rename these tables first.';
  end if;

  execute $trunkline_schema$
{schema}$trunkline_schema$;
  execute format('comment on schema private is %L', 'Trunkline ' || version);
end
{TAG};
"
    )
}

/// The version that a database says it has where the file was pasted into it: `Trunkline` and this, as the comment on the schema `private`.
pub fn version(files: &[SchemaFile]) -> String {
    fingerprint(&whole(files))
}

fn whole(files: &[SchemaFile]) -> String {
    files.iter().map(|file| format!("-- {}\n\n{}\n", file.name, file.sql.trim_end())).collect()
}

/// Names in lines of a readable length.
fn wrapped(names: &[String]) -> String {
    let mut lines = vec![String::from("      ")];
    for (index, name) in names.iter().enumerate() {
        let piece = if index + 1 < names.len() { format!("{name}, ") } else { name.clone() };
        match lines.last_mut() {
            Some(line) if line.len() + piece.len() <= 120 => line.push_str(&piece),
            _ => lines.push(format!("      {piece}")),
        }
    }
    lines.iter().map(|line| line.trim_end()).collect::<Vec<_>>().join("\n")
}

/// Which schema this is, in twelve hexadecimal digits.
fn fingerprint(schema: &str) -> String {
    use sha2::{Digest, Sha256};
    Sha256::digest(schema.as_bytes()).iter().take(6).map(|byte| format!("{byte:02x}")).collect()
}
