//! The ways to a single row: by its key, with what it refers to, and from there. Whoever may do something with a table may do it with any
//! of the organization's rows, by each of them.

use super::{
    Expect, Probe, Proof,
    generate::{self, FIRST, SECOND, Side, Table},
    matrix::{self, Wall},
    own::Granted,
    people::{Holds, Persona},
};
use anyhow::{Context, Result};
use serde_json::Value;

/// Rows that are gone to one by one, and rows that somebody adds, each of them another one.
const EACH: usize = 3;

impl Proof {
    /// The own people of both organizations with single rows of a table.
    pub async fn ways(&self, table: &Table) -> Result<Vec<String>> {
        let wall = matrix::of(&table.name).with_context(|| format!("public.{} has no line", table.name))?;
        if table.tenant.is_none() {
            return Ok(Vec::new());
        }
        let granted = Granted::of(self, &table.name).await?;
        let mut probes = Vec::new();
        for persona in self.everybody.iter().filter(|persona| persona.holds != Holds::Outside) {
            probes.extend(self.to_rows(table, wall, persona, SECOND, &granted)?);
        }
        for persona in &self.at_home {
            probes.extend(self.to_rows(table, wall, persona, FIRST, &granted)?);
        }
        let wrong = self.run(probes).await?;
        Ok(wrong.into_iter().map(|finding| format!("public.{}: {finding}", table.name)).collect())
    }

    fn to_rows(
        &self,
        table: &Table,
        wall: &Wall,
        persona: &Persona,
        side: Side,
        granted: &Granted,
    ) -> Result<Vec<Probe>> {
        let name = &table.name;
        let mut probes = Vec::new();
        let mut may = |what: String, sql: String| {
            probes.push(Probe::new(persona, true, &what, Expect::Rows(1), sql));
        };
        if wall.seen == "true" && persona.may(wall.see) {
            for row in self.rows.get(&(name.clone(), side.name)).into_iter().flatten().take(EACH) {
                let this = key_of(table, row, "child");
                for (parent, theirs) in table.parents(row) {
                    let seen = matrix::of(parent).is_some_and(|wall| wall.seen == "true" && persona.may(wall.see));
                    if !seen {
                        continue;
                    }
                    let sql = format!(
                        "select from public.{name} as child
                         cross join lateral (select parent.* from public.{parent} as parent where {theirs}) as embedded
                         where {this}"
                    );
                    may(format!("finds a row with its {parent}"), sql);
                    let sql = format!(
                        "select from public.{parent} as parent
                         where exists (select from public.{name} as child where {theirs} and {this})"
                    );
                    may(format!("finds a row from its {parent}"), sql);
                }
                if wall.changeable != "true" {
                    continue;
                }
                if persona.may(wall.change) {
                    for column in &granted.changeable {
                        let sql = format!("update public.{name} as child set {column} = {column} where {this}");
                        may(format!("changes {column} of one row"), sql);
                    }
                }
                if persona.may(wall.remove) {
                    may("deletes one row".to_owned(), format!("delete from public.{name} as child where {this}"));
                }
            }
        }
        if wall.in_the_way.is_none() && persona.may(wall.insert) {
            for n in generate::ROWS + 1..=generate::ROWS + EACH {
                let (into, values): (Vec<_>, Vec<_>) = table
                    .row(side, n, &self.rows)?
                    .into_iter()
                    .filter(|(column, _)| granted.insertable.contains(column))
                    .unzip();
                if !into.is_empty() {
                    let sql = format!("insert into public.{name} ({}) values ({})", into.join(", "), values.join(", "));
                    may(format!("adds a row of its own, number {n}"), sql);
                }
            }
        }
        Ok(probes)
    }
}

/// The condition that finds a row by its primary key.
fn key_of(table: &Table, row: &Value, alias: &str) -> String {
    let parts: Vec<String> =
        table.primary.iter().map(|column| format!("{alias}.{column} = {}", generate::literal(row, column))).collect();
    parts.join(" and ")
}
