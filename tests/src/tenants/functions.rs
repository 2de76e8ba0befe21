//! What users' functions give and take: nothing of another organization to anybody, and to an organization's own people what their role
//! lets them do.

use super::{
    Expect, Probe, Proof,
    generate::{FIRST, SECOND, Side},
    matrix::{self, Use},
    people::{self, Holds, Persona, staff},
};
use anyhow::Result;
use serde_json::{Value, json};

impl Proof {
    /// Everybody calls a public function on what is their own organization's, row by row: it does what the matrix says, or refuses with the
    /// right code.
    pub async fn uses(&self, name: &str) -> Result<Vec<String>> {
        let Some(expected) = matrix::FUNCTIONS.iter().find(|known| known.name == name) else {
            return Ok(vec![format!("public.{name} has no line in tenants/matrix.rs")]);
        };
        let mut tries: Vec<(Persona, Side, usize)> = Vec::new();
        let staff = [staff()];
        let abroad = self.everybody.iter().chain(&staff).map(|persona| (persona, SECOND));
        for (persona, side) in abroad.chain(self.at_home.iter().map(|persona| (persona, FIRST))) {
            // Whoever may, may with each row; whoever may not is turned away before any row is looked at.
            let rows = if persona.may(expected.right) { self.rows_named(expected, side) } else { 1 };
            tries.extend((0..rows).map(|row| (persona.clone(), side, row)));
        }
        let probes: Vec<Value> = tries
            .iter()
            .map(|(persona, side, row)| {
                let fill = |sql: &str| self.filled(sql, persona, *side, *row);
                let mut probe = Probe::new(
                    persona,
                    false,
                    name,
                    Expect::Nothing,
                    format!("select public.{name}({})::text", fill(expected.arguments)),
                );
                probe.body["answer"] = true.into();
                if !expected.first.is_empty() {
                    probe.body["first"] = fill(expected.first).into();
                }
                probe.body
            })
            .collect();
        let answers: Value = self.client.query_one("select probe.run($1)", &[&json!(probes)]).await?.get(0);
        let mut count = self.count.get();
        let mut wrong = Vec::new();
        for ((persona, side, row), answer) in tries.iter().zip(answers.as_array().into_iter().flatten()) {
            let wanted = (!persona.may(expected.right)).then(|| refusal(expected, persona));
            match wanted {
                None => count.allowed += 1,
                Some(_) => count.denied += 1,
            }
            let said = answer["said"].as_str().unwrap_or_default();
            let code = match answer["state"].as_str() {
                Some("PGRST") => first_json(said)["code"].as_str().unwrap_or_default().to_owned(),
                other => other.unwrap_or_default().to_owned(),
            };
            if code != wanted.unwrap_or_default() {
                wrong.push(format!(
                    "public.{name}: {} with row {row} of the {} organization should get {}, and gets {}: {said}",
                    persona.name,
                    side.name,
                    wanted.unwrap_or("what they ask for"),
                    if code.is_empty() { "what they ask for" } else { &code },
                ));
            }
        }
        self.count.set(count);
        Ok(wrong)
    }

    /// How many rows of an organization the tables hold that a function's arguments name: it is tried with each.
    fn rows_named(&self, expected: &Use, side: Side) -> usize {
        let named = |table: &str| expected.arguments.contains(&format!("{{{table}}}"));
        let counts =
            self.rows.iter().filter(|((table, of), _)| *of == side.name && named(table)).map(|(_, rows)| rows.len());
        counts.min().unwrap_or(1)
    }

    /// `{me}` is the persona, `{org}` their organization, `{member}` and `{peer}` two of its people, `{leads}` one of its rows in `leads`,
    /// and so on.
    fn filled(&self, sql: &str, persona: &Persona, side: Side, row: usize) -> String {
        let (member, peer) = people::others(side);
        let mut sql = sql.replace("{me}", &persona.id).replace("{org}", side.id);
        sql = sql.replace("{member}", &member).replace("{peer}", &peer);
        for ((table, of), rows) in &self.rows {
            let place = format!("{{{table}}}");
            if *of == side.name && sql.contains(&place) {
                let id = rows.get(row % rows.len().max(1)).and_then(|row| row["id"].as_str());
                sql = sql.replace(&place, id.unwrap_or_default());
            }
        }
        sql
    }

    /// The names of the public functions that users may execute.
    pub async fn public_functions(&self) -> Result<Vec<String>> {
        self.strings(
            "select distinct proname::text from pg_proc
             where pronamespace = 'public'::regnamespace and prorettype <> 'trigger'::regtype
               and (has_function_privilege('anon', oid, 'execute') or has_function_privilege('authenticated', oid, 'execute'))
               and not exists (select from pg_depend where classid = 'pg_proc'::regclass and objid = pg_proc.oid and deptype = 'e')
             order by 1",
        )
        .await
    }

    /// Everybody calls one function with what is the first organization's.
    pub async fn function(&self, oid: u32) -> Result<Vec<String>> {
        let row = self
            .client
            .query_one(
                "select oid::regprocedure::text, pronamespace::regnamespace::text || '.' || proname,
                   coalesce(proargnames::text[], '{}'),
                   array(select format_type(t, null) from unnest(proargtypes::oid[]) as t)
                 from pg_proc where oid = $1",
                &[&oid],
            )
            .await?;
        let (signature, called): (String, String) = (row.get(0), row.get(1));
        let (names, types): (Vec<String>, Vec<String>) = (row.get(2), row.get(3));
        let mut wrong = Vec::new();
        let all: Vec<String> = self
            .tables
            .iter()
            .filter(|table| table.tenant.is_some())
            .map(|table| {
                format!(
                    "(select string_agg(t::text, '|' order by t::text) from public.{} as t where {})",
                    table.name,
                    table.of(FIRST)
                )
            })
            .collect();
        let watched = format!("select md5(concat_ws('#', {}))", all.join(", "));
        let baseline: String = self.client.query_one(&watched, &[]).await?.get(0);
        let argument = |n: usize, id: &str| match types[n].as_str() {
            "uuid" => format!("'{id}'::uuid"),
            "text" => "'isolation'".to_owned(),
            "text[]" => "array['usage.write']".to_owned(),
            "uuid[]" => format!("array['{id}']::uuid[]"),
            "jsonb" => format!("'{{\"v\": 1, \"organization_id\": \"{}\", \"id\": \"{id}\"}}'::jsonb", FIRST.id),
            "integer" | "bigint" | "smallint" => "1".to_owned(),
            "boolean" => "true".to_owned(),
            "timestamp with time zone" => "now()".to_owned(),
            other => format!("null::{other}"),
        };
        let ids: Vec<&str> = self
            .rows
            .iter()
            .filter(|((_, side), _)| *side == FIRST.name)
            .filter_map(|((table, _), rows)| Some((table, rows.first()?["id"].as_str()?)))
            .filter(|(table, _)| {
                !names.iter().any(|name| name.ends_with("_id"))
                    || names.contains(&format!("{}_id", table.trim_end_matches('s')))
            })
            .map(|(_, id)| id)
            .collect();
        let nothing = "00000000-0000-4000-8000-0000000000ff";
        let tries: Vec<&str> = if types.iter().any(|kind| kind.contains("uuid") || kind == "jsonb") {
            std::iter::once(nothing).chain(ids.iter().copied()).collect()
        } else {
            vec![nothing]
        };
        for persona in &self.everybody {
            let mut probes = Vec::new();
            for id in &tries {
                let arguments: Vec<String> = (0..types.len()).map(|n| argument(n, id)).collect();
                let sql = format!("select {called}({})::text", arguments.join(", "));
                let mut probe = Probe::new(persona, false, &sql, Expect::Nothing, sql.clone()).watching(&watched);
                probe.body["answer"] = true.into();
                probe.body["before"] = baseline.as_str().into();
                probes.push(probe.body);
            }
            let answers: Value = self.client.query_one("select probe.run($1)", &[&json!(probes)]).await?.get(0);
            let mut count = self.count.get();
            count.denied += tries.len();
            self.count.set(count);
            for (id, answer) in tries.iter().zip(answers.as_array().into_iter().flatten()) {
                // To ask for what is another's is to ask for what is not there: the same answer, but for the id that was sent.
                let text = |answer: &Value, id: &str| {
                    format!("{} {} {}", answer["state"], answer["said"], answer["result"]).replace(id, "it")
                };
                let leaks = |text: &str| {
                    ids.iter().any(|known| text.contains(known))
                        || text.contains("isolation-first")
                        || text.contains(FIRST.id)
                };
                let (said, of_nothing) = (text(answer, id), text(&answers[0], nothing));
                let refused = answer["state"] != Value::Null;
                if answer["harm"] == true || leaks(&said) || refused && said != of_nothing {
                    wrong.push(format!(
                        "{signature}: {} with {id}: {said}; with an id that is not there: {of_nothing}",
                        persona.name
                    ));
                }
            }
        }
        Ok(wrong)
    }

    /// Functions that `anon` or `authenticated` may execute, wrappers and bodies.
    pub async fn functions(&self) -> Result<Vec<u32>> {
        let rows = self
            .client
            .query(
                "select oid from pg_proc
                 where pronamespace in ('public'::regnamespace, 'private'::regnamespace) and prorettype <> 'trigger'::regtype
                   and (has_function_privilege('anon', oid, 'execute') or has_function_privilege('authenticated', oid, 'execute'))
                   and not exists (select from pg_depend where classid = 'pg_proc'::regclass and objid = pg_proc.oid and deptype = 'e')
                 order by oid::regprocedure::text",
                &[],
            )
            .await?;
        Ok(rows.iter().map(|row| row.get(0)).collect())
    }
}

/// The code with which somebody is turned away who lacks the right.
fn refusal(expected: &Use, persona: &Persona) -> &'static str {
    let own = expected.refused.iter().find(|(part, _)| persona.name.contains(part));
    match (persona.role, own) {
        ("anon", _) => "42501",
        (_, Some((_, code))) => code,
        _ if persona.holds == Holds::Outside => "no_organization",
        _ => "permission_denied",
    }
}

fn first_json(text: &str) -> Value {
    serde_json::Deserializer::from_str(text).into_iter::<Value>().next().and_then(Result::ok).unwrap_or_default()
}
