//! Rating in the database against rating here, written for nothing but this comparison: the same amounts, to the unit, for random plans
//! and usages. 2,000 of them; `RATING_CASES=100000` takes more.

use anyhow::{Context, Result};
use local::parts::postgres::Role;
use serde_json::{Value, json};
use std::env;
use tests::{Database, supervisor_binary};

/// The cases of one request.
const BATCH: usize = 2_000;

/// Everything that a case is rated to, by the functions that bill.
const RATE: &str = "
    select jsonb_agg(jsonb_build_array(
        (select coalesce(jsonb_agg(jsonb_build_array(line.kind, line.units, line.unit_price_minor, line.price_units, line.amount_minor) order by line.number), '[]')
         from private.rate_term(term, (given ->> 'quantity')::bigint) as line),
        private.rate_term_total(term, (given ->> 'quantity')::bigint),
        private.rate_term_total(term, (given ->> 'billed')::bigint),
        private.tax_amount((given ->> 'base')::bigint, (given ->> 'rate_bp')::numeric),
        private.prorate((given ->> 'base')::bigint, (given ->> 'left')::numeric, (given ->> 'whole')::numeric),
        private.prorate(-(given ->> 'base')::bigint, (given ->> 'left')::numeric, (given ->> 'whole')::numeric),
        to_jsonb(private.allocate_largest_remainder((given ->> 'base')::bigint, array(select jsonb_array_elements_text(given -> 'weights'))::numeric[]))
      ) order by number)::text
    from jsonb_array_elements($1::text::jsonb) with ordinality as one (given, number)
    cross join lateral jsonb_populate_record(null::public.plan_price_meters, given -> 'term') as term";

/// Random numbers that are the same in every run (splitmix64).
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Up to and with `most`; small numbers as often as large ones.
    fn up_to(&mut self, most: i128) -> i128 {
        let bits = 1 + self.roll() % 40;
        i128::from(self.roll() >> (64 - bits)) % (most + 1)
    }

    fn one_of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.roll() as usize % choices.len()]
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Model {
    PerUnit,
    Package,
    Graduated,
    Volume,
}

#[derive(Debug)]
struct Tier {
    /// The last one has none.
    end: Option<i128>,
    unit: i128,
    flat: i128,
}

#[derive(Debug)]
struct Case {
    model: Model,
    /// None is all of it.
    included: Option<i128>,
    /// None is not sold.
    price: Option<i128>,
    per: i128,
    tiers: Vec<Tier>,
    quantity: i128,
    billed: i128,
    base: i128,
    rate_bp: i128,
    left: i128,
    whole: i128,
    weights: Vec<i128>,
}

impl Case {
    fn random(dice: &mut Dice) -> Self {
        let model = dice.one_of(&[Model::PerUnit, Model::Package, Model::Graduated, Model::Volume]);
        let mut tiers = Vec::new();
        let mut end = 0;
        for _ in 0..dice.roll() % 5 {
            end += 1 + dice.up_to(100_000);
            tiers.push(Tier { end: Some(end), unit: dice.up_to(1_000_000), flat: dice.up_to(1_000_000) });
        }
        tiers.push(Tier { end: None, unit: dice.up_to(1_000_000), flat: dice.one_of(&[0, 0, 7, 50_000]) });
        // The ends of tiers, and what is beside them, more often than chance would have them.
        let edge = dice.one_of(&[0, 1, -1]) + end;
        let included = dice.one_of(&[Some(0), Some(1), Some(60_000), None]);
        let quantity = match dice.roll() % 3 {
            0 => (edge + included.unwrap_or(0)).max(0),
            _ => dice.up_to(1_000_000_000),
        };
        let whole = dice.one_of(&[28, 29, 30, 31, 365, 366]) * 86_400 + dice.one_of(&[0, 3_600, -3_600]);
        Self {
            model,
            included,
            price: if model == Model::PerUnit && dice.roll().is_multiple_of(8) {
                None
            } else {
                Some(dice.up_to(1_000_000))
            },
            per: dice.one_of(&[1, 3, 7, 60, 1_000, 86_399]),
            tiers,
            quantity,
            billed: dice.up_to(quantity),
            base: dice.up_to(1_000_000_000),
            rate_bp: dice.one_of(&[0, 1, 250, 900, 1_800, 2_000, 9_999]),
            left: dice.up_to(whole),
            whole,
            weights: (0..1 + dice.roll() % 6).map(|_| 1 + dice.up_to(1_000_000)).collect(),
        }
    }

    fn as_json(&self) -> Value {
        let tiers: Vec<_> = self
            .tiers
            .iter()
            .map(|tier| json!({ "up_to": tier.end.map(|end| end as i64), "unit_minor": tier.unit as i64, "flat_minor": tier.flat as i64 }))
            .collect();
        json!({
            "term": {
                "plan_price_id": "00000000-0000-4000-8000-000000000001", "meter_key": "ai_calls",
                "included_units": self.included.unwrap_or(-1) as i64,
                "overage_price_minor": self.price.map(|price| price as i64),
                "overage_unit": self.per as i64,
                "pricing_model": match self.model {
                    Model::PerUnit => "per_unit",
                    Model::Package => "package",
                    Model::Graduated => "graduated",
                    Model::Volume => "volume",
                },
                "tiers": matches!(self.model, Model::Graduated | Model::Volume).then_some(tiers),
            },
            "quantity": self.quantity as i64, "billed": self.billed as i64, "base": self.base as i64, "rate_bp": self.rate_bp as i64,
            "left": self.left as i64, "whole": self.whole as i64,
            "weights": self.weights.iter().map(|weight| *weight as i64).collect::<Vec<_>>(),
        })
    }

    /// The lines: kind, units, price, what the price is for, amount.
    fn lines(&self, quantity: i128) -> Vec<(&'static str, i128, i128, i128, i128)> {
        let (Some(included), Some(price)) = (self.included, self.price) else { return Vec::new() };
        let beyond = quantity - included;
        if beyond <= 0 {
            return Vec::new();
        }
        let mut lines = Vec::new();
        match self.model {
            Model::PerUnit => lines.push(("overage", beyond, price, self.per, nearest(beyond * price, self.per))),
            Model::Package => {
                let mut begun = beyond / self.per;
                if begun * self.per < beyond {
                    begun += 1;
                }
                lines.push(("overage", beyond, price, self.per, begun * price));
            }
            Model::Volume => {
                let reached = self.tiers.iter().find(|tier| tier.end.is_none_or(|end| beyond <= end));
                if let Some(tier) = reached {
                    self.push(&mut lines, tier, beyond);
                }
            }
            Model::Graduated => {
                let (mut rest, mut from) = (beyond, 0);
                for tier in &self.tiers {
                    let room = tier.end.map_or(rest, |end| end - from);
                    let here = rest.min(room);
                    if here > 0 {
                        self.push(&mut lines, tier, here);
                    }
                    rest -= here;
                    from = tier.end.unwrap_or(from);
                }
            }
        }
        lines
    }

    fn push(&self, lines: &mut Vec<(&'static str, i128, i128, i128, i128)>, tier: &Tier, units: i128) {
        lines.push(("overage", units, tier.unit, self.per, nearest(units * tier.unit, self.per)));
        if tier.flat > 0 {
            lines.push(("fee", 1, tier.flat, 1, tier.flat));
        }
    }

    fn total(&self, quantity: i128) -> i128 {
        self.lines(quantity).iter().map(|line| line.4).sum()
    }

    /// The base split by weights: whole shares first, then one more each where the remainder is largest.
    fn shares(&self) -> Vec<i128> {
        let whole: i128 = self.weights.iter().sum();
        let mut shares: Vec<_> = self.weights.iter().map(|weight| self.base * weight / whole).collect();
        let mut order: Vec<_> = (0..shares.len()).collect();
        order.sort_by_key(|&place| (-(self.base * self.weights[place] % whole), place));
        let missing = self.base - shares.iter().sum::<i128>();
        for &place in order.iter().take(missing as usize) {
            shares[place] += 1;
        }
        shares
    }

    fn rated(&self) -> Value {
        let whole = |amount: i128| json!(amount as i64);
        json!([
            self.lines(self.quantity)
                .iter()
                .map(|line| json!([line.0, line.1 as i64, line.2 as i64, line.3 as i64, line.4 as i64]))
                .collect::<Vec<_>>(),
            whole(self.total(self.quantity)),
            whole(self.total(self.billed)),
            whole(nearest(self.base * self.rate_bp, 10_000)),
            whole(nearest(self.base * self.left, self.whole)),
            whole(-nearest(self.base * self.left, self.whole)),
            self.shares().into_iter().map(whole).collect::<Vec<_>>(),
        ])
    }
}

/// A quotient of what is not negative to the nearest whole number, a half upwards: by its remainder.
fn nearest(dividend: i128, divisor: i128) -> i128 {
    let (down, rest) = (dividend / divisor, dividend % divisor);
    if rest >= divisor - rest { down + 1 } else { down }
}

#[tokio::test]
async fn the_database_rates_random_plans_as_the_reference_does() -> Result<()> {
    let wanted = match env::var("RATING_CASES") {
        Ok(given) => given.parse().context("RATING_CASES is a number")?,
        Err(_) => 2_000,
    };
    let database = Database::migrated(supervisor_binary!()).await?;
    let sql = database.connect(Role::Owner).await?;
    let mut dice = Dice(20_261_124);
    let (mut done, mut beyond) = (0, 0);
    while done < wanted {
        let cases: Vec<_> = (done..wanted.min(done + BATCH)).map(|_| Case::random(&mut dice)).collect();
        let given = Value::from(cases.iter().map(Case::as_json).collect::<Vec<_>>()).to_string();
        let row = sql.query_one(RATE, &[&given]).await?;
        let rated: Vec<Value> = serde_json::from_str(row.get(0))?;
        assert_eq!(rated.len(), cases.len());
        for (case, rated) in cases.iter().zip(&rated) {
            assert_eq!(*rated, case.rated(), "{case:?}");
            beyond += usize::from(!case.lines(case.quantity).is_empty());
        }
        done += cases.len();
    }
    assert!(beyond * 2 > wanted, "only {beyond} of {wanted} cost something");
    Ok(())
}
