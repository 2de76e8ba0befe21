//! What an organization's own people can do with their own rows: the other half of every refusal.

use super::{
    Expect, Probe, Proof,
    generate::{self, FIRST, SECOND, Side, Table},
    matrix::{Right, Wall},
    people::{Holds, Persona},
};
use anyhow::Result;

/// The columns of a table that `authenticated` holds a grant on.
pub(super) struct Granted {
    pub(super) insertable: Vec<String>,
    pub(super) changeable: Vec<String>,
    pub(super) readable: Vec<String>,
}

impl Granted {
    pub(super) async fn of(proof: &Proof, table: &str) -> Result<Self> {
        let columns = |kind: &str, which: &str| {
            format!(
                "select attname::text from pg_attribute where attrelid = 'public.{table}'::regclass and attnum > 0
                 and not attisdropped and {which} and has_column_privilege('authenticated', attrelid, attnum, '{kind}')"
            )
        };
        Ok(Self {
            insertable: proof.strings(&columns("insert", "attgenerated = ''")).await?,
            changeable: proof.strings(&columns("update", "attgenerated = ''")).await?,
            readable: proof.strings(&columns("select", "true")).await?,
        })
    }
}

impl Proof {
    /// Attempts of a persona with one organization's rows of a table, judged by the matrix.
    pub(super) async fn own(
        &self,
        table: &Table,
        wall: &Wall,
        persona: &Persona,
        side: Side,
        granted: &Granted,
    ) -> Result<Vec<Probe>> {
        let name = &table.name;
        let mut probes = Vec::new();
        let mine = |right: Right, what: &str, sql: String| {
            let expect = if persona.may(right) { Expect::Some } else { Expect::Nothing };
            Probe::new(persona, true, what, expect, sql)
        };
        let (seen, own) = (wall.seen.replace("{me}", &persona.id), table.of(side));
        if persona.may(wall.see) {
            let sql = format!("select from public.{name} where {own} and {seen}");
            let rows: i64 =
                self.client.query_one(&format!("select count(*) from ({sql}) as all_of_them"), &[]).await?.get(0);
            probes.push(Probe::new(persona, true, "sees all of its own rows", Expect::Rows(rows), sql));
            let sql = format!(
                "select from (select count(*) from public.{name} where {own} and {seen}) as c (n) where n = {rows}"
            );
            probes.push(Probe::new(persona, true, "counts its own rows", Expect::Some, sql));
            let ids =
                self.rows.get(&(name.clone(), side.name)).into_iter().flatten().filter_map(|row| row["id"].as_str());
            for id in ids.filter(|_| wall.seen == "true") {
                let sql = format!("select from public.{name} where id = '{id}'");
                probes.push(Probe::new(persona, true, "finds a row of its own by its id", Expect::Rows(1), sql));
            }
            for column in &granted.readable {
                let sql = format!("select {column} from public.{name} where {own} and {seen}");
                probes.push(Probe::new(persona, true, "reads a field of its own rows", Expect::Rows(rows), sql));
            }
        } else if persona.holds != Holds::Outside && name != "profiles" {
            let sql = format!("select from public.{name} where {own}");
            probes.push(Probe::new(persona, true, "sees own rows without the permission", Expect::Nothing, sql));
        }
        if persona.holds == Holds::Outside {
            return Ok(probes);
        }
        let changeable_rows = wall.changeable.replace("{me}", &persona.id);
        for column in &granted.changeable {
            let sql = format!("update public.{name} set {column} = {column} where {own} and {changeable_rows}");
            probes.push(mine(wall.change, "changes its own rows", sql));
        }
        if granted.changeable.is_empty() && wall.change != Right::Nobody {
            probes.push(mine(wall.change, "changes its own rows", format!("update public.{name} set id = id")));
        }
        let sql = format!("delete from public.{name} where {own} and {changeable_rows}");
        probes.push(mine(wall.remove, "deletes its own rows", sql));
        let with_room = |mut probe: Probe| {
            if let Some(rows) = wall.in_the_way {
                probe.body["first"] = format!("delete from public.{name} where {rows}").into();
            }
            probe
        };
        let (mut into, mut values) = (Vec::new(), Vec::new());
        for (column, value) in table.row(side, generate::ROWS, &self.rows)? {
            if granted.insertable.contains(&column) {
                into.push(column);
                values.push(value);
            }
        }
        if into.is_empty() {
            let sql = format!("insert into public.{name} default values");
            probes.push(with_room(mine(wall.insert, "adds its own row", sql)));
            return Ok(probes);
        }
        let insert = |values: &[String]| {
            format!("insert into public.{name} ({}) values ({})", into.join(", "), values.join(", "))
        };
        let expect = if persona.may(wall.insert) { Expect::Some } else { Expect::Refused };
        probes.push(with_room(Probe::new(persona, true, "adds its own row", expect, insert(&values))));
        // The same row, pointing at what is the other organization's.
        let other = if side == FIRST { SECOND } else { FIRST };
        let theirs = table.row(other, 0, &self.rows)?;
        for (number, column) in into.iter().enumerate().filter(|(_, column)| table.refers(column)) {
            let mut crossing = values.clone();
            if let Some((_, value)) = theirs.iter().find(|(known, _)| known == column) {
                crossing[number].clone_from(value);
                let what = format!("adds a row whose {column} is the other's");
                probes.push(Probe::new(persona, false, &what, Expect::Fails, insert(&crossing)));
            }
        }
        Ok(probes)
    }
}
