//! Who tries: every kind of user there is, and the two organizations that they belong to or not.

use super::{
    generate::{FIRST, Rows, SECOND, Side},
    matrix::{MEMBER, Right},
};
use anyhow::Result;
use serde_json::{Value, json};
use tokio_postgres::Client;

/// What a user may do in the second organization.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Holds {
    /// Not in it.
    Outside,
    /// In it, with no permission at all.
    None,
    /// What a member holds by default.
    Member,
    /// What an admin holds by default.
    Admin,
    /// Every permission.
    All,
}

/// One user, or nobody.
#[derive(Debug, Clone)]
pub struct Persona {
    /// Who it is, for a finding.
    pub name: &'static str,
    /// The database role.
    pub role: &'static str,
    /// The user's id; all zeros for nobody.
    pub id: String,
    /// The token's claims.
    pub claims: String,
    /// What they may do in the second organization.
    pub holds: Holds,
}

impl Persona {
    /// Whether the expectation lets them.
    pub fn may(&self, right: Right) -> bool {
        let holds = |permission: &&str| match self.holds {
            Holds::Outside | Holds::None => false,
            Holds::Member => MEMBER.contains(permission),
            Holds::Admin => *permission != "organization.manage",
            Holds::All => true,
        };
        match right {
            Right::Nobody => false,
            Right::Everyone => self.role == "authenticated",
            Right::Members => self.holds != Holds::Outside,
            Right::Strangers => self.id == id(STRANGER),
            Right::Staff => self.id == id(STAFF),
            Right::With(permissions) => permissions.iter().all(holds),
        }
    }
}

/// The user who belongs nowhere.
const STRANGER: usize = 10;
/// A platform admin.
const STAFF: usize = 13;

fn id(number: usize) -> String {
    format!("0000000{number:x}-0000-4000-9000-00000000000{number:x}")
}

fn persona(name: &'static str, number: usize, holds: Holds) -> Persona {
    let claims = json!({ "sub": id(number), "role": "authenticated" }).to_string();
    Persona { name, role: "authenticated", id: id(number), claims, holds }
}

/// A platform admin, who sees nobody's rows without a session, and begins one by a function.
pub fn staff() -> Persona {
    persona("the operator's staff", STAFF, Holds::Outside)
}

/// Everybody to whom the first organization is closed.
pub fn everybody() -> Vec<Persona> {
    let mut all = vec![
        Persona {
            name: "anon",
            role: "anon",
            id: id(0),
            claims: json!({ "role": "anon" }).to_string(),
            holds: Holds::Outside,
        },
        persona("a suspended user of it", 3, Holds::Outside),
        persona("an invited user of it", 4, Holds::Outside),
        persona("the other's owner", 5, Holds::All),
        persona("the other's admin", 6, Holds::Admin),
        persona("the other's member", 7, Holds::Member),
        persona("the other's custom role with every permission", 8, Holds::All),
        persona("the other's custom role with no permission", 9, Holds::None),
        persona("a user without an organization", STRANGER, Holds::Outside),
        persona("a user who is gone", 11, Holds::Outside),
    ];
    // A token may say what it likes: only its subject counts.
    let mut liar = persona("the other's owner, whose token names it", 5, Holds::All);
    liar.claims = json!({
        "sub": id(5), "role": "authenticated", "organization_id": FIRST.id, "system_role": "platform_admin",
        "app_metadata": { "organization_id": FIRST.id, "role": "owner" },
        "user_metadata": { "organization_id": FIRST.id, "system_role": "platform_admin" },
    })
    .to_string();
    all.push(liar);
    all
}

/// The first organization's own people, to whom it is open.
pub fn at_home() -> Vec<Persona> {
    vec![
        persona("its owner", 1, Holds::All),
        persona("its member", 2, Holds::Member),
        persona("its admin", 12, Holds::Admin),
    ]
}

/// A member of an organization, and one more of its people, for functions that are about them.
pub fn others(side: Side) -> (String, String) {
    if side.id == FIRST.id { (id(2), id(12)) } else { (id(7), id(8)) }
}

/// Makes the organizations, their people, and the reference rows that one of them alone may see.
pub async fn make(client: &Client, rows: &mut Rows) -> Result<()> {
    let (first, second) = (FIRST.id, SECOND.id);
    let mut sql = format!(
        "insert into public.organizations (id, name) values ('{first}', 'isolation-first'), ('{second}', 'isolation-second');
         insert into public.roles (organization_id, name, permissions)
         select '{second}', 'All', jsonb_agg(key) from public.permissions;
         insert into public.roles (organization_id, name) values ('{second}', 'None');
         insert into public.meters (key, name, unit, is_active) values ('isolation_hidden', 'Hidden', 'thing', false);
         insert into public.subscription_plans (slug, name, is_public)
         values ('isolation-first', 'First', false), ('isolation-second', 'Second', false);
         insert into public.plan_prices (plan_id, version, base_minor)
         select id, 1, case slug when 'isolation-first' then 987654321 else 1 end
         from public.subscription_plans where slug ~ '^isolation-';
         insert into public.plan_price_meters (plan_price_id, meter_key, limit_units)
         select price.id, 'ai_calls', case plan.slug when 'isolation-first' then 987654321 end
         from public.plan_prices as price join public.subscription_plans as plan on plan.id = price.plan_id
         where plan.slug ~ '^isolation-';"
    );
    let people = [
        (1, Some(first), "owner", "active", "null"),
        (2, Some(first), "member", "active", "null"),
        (3, Some(first), "admin", "suspended", "null"),
        (4, Some(first), "admin", "invited", "null"),
        (5, Some(second), "owner", "active", "null"),
        (6, Some(second), "admin", "active", "null"),
        (7, Some(second), "member", "active", "null"),
        (8, Some(second), "member", "active", "'All'"),
        (9, Some(second), "member", "active", "'None'"),
        (STRANGER, None, "member", "active", "null"),
        (12, Some(first), "admin", "active", "null"),
        (STAFF, None, "platform_admin", "active", "null"),
    ];
    for (number, organization, system_role, status, role) in people {
        let id = id(number);
        let organization = organization.map_or_else(|| "null".to_owned(), |id| format!("'{id}'"));
        sql += &format!(
            "insert into auth.users (id, email) values ('{id}', 'isolation-{number}@example.com');
             insert into public.profiles (id, organization_id, system_role, status, email, role_id)
             values ('{id}', {organization}, '{system_role}', '{status}', 'isolation-{number}@example.com',
               (select role.id from public.roles as role where role.organization_id = {organization} and role.name = {role}));"
        );
    }
    client.batch_execute(&sql).await?;
    for side in [FIRST, SECOND] {
        for (table, column) in [("organizations", "id"), ("profiles", "organization_id")] {
            let made = client
                .query(
                    &format!("select to_jsonb(t) from public.{table} as t where {column} = '{}' order by id", side.id),
                    &[],
                )
                .await?;
            rows.insert((table.to_owned(), side.name), made.iter().map(|row| row.get::<_, Value>(0)).collect());
        }
    }
    Ok(())
}
