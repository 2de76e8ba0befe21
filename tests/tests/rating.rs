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
        to_jsonb(private.allocate_largest_remainder((given ->> 'base')::bigint, array(select jsonb_array_elements_text(given -> 'weights'))::numeric[])),
        (select jsonb_build_array(taken.shares, taken.cuts)
         from private.discount_shares(
           (given ->> 'room')::bigint, array(select jsonb_array_elements_text(given -> 'weights'))::bigint[],
           array(select jsonb_array_elements_text(given -> 'percents'))::integer[], array(select jsonb_array_elements_text(given -> 'amounts'))::bigint[]
         ) as taken)
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
    /// What discounts are taken off of the weights: all of it, or less where something is given back.
    room: i128,
    discounts: Vec<Discount>,
}

/// What is taken off, in turn.
#[derive(Debug, Clone, Copy)]
enum Discount {
    /// Hundredths of a percent.
    Percent(i128),
    Amount(i128),
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
        let weights: Vec<_> = (0..1 + dice.roll() % 6).map(|_| 1 + dice.up_to(1_000_000)).collect();
        let sum: i128 = weights.iter().sum();
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
            room: if dice.roll().is_multiple_of(2) { sum } else { dice.up_to(sum) },
            discounts: (0..dice.roll() % 4)
                .map(|_| match dice.roll() % 2 {
                    0 => Discount::Percent(dice.one_of(&[1, 333, 1_000, 2_500, 9_999, 10_000])),
                    _ => Discount::Amount(1 + dice.up_to(1_000_000)),
                })
                .collect(),
            weights,
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
            "room": self.room as i64,
            "percents": self.discounts.iter().map(|discount| match *discount {
                Discount::Percent(percent) => Some(percent as i64),
                Discount::Amount(_) => None,
            }).collect::<Vec<_>>(),
            "amounts": self.discounts.iter().map(|discount| match *discount {
                Discount::Percent(_) => None,
                Discount::Amount(amount) => Some(amount as i64),
            }).collect::<Vec<_>>(),
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

    /// What every line loses, and what every discount takes off.
    fn taken_off(&self) -> (Vec<i128>, Vec<i128>) {
        let mut rest = self.weights.clone();
        let mut room = self.room;
        let mut cuts = Vec::new();
        for discount in &self.discounts {
            let cut = match *discount {
                Discount::Percent(percent) => nearest(room * percent, 10_000),
                Discount::Amount(amount) => amount.min(room),
            };
            if cut > 0 {
                let shares = split(cut, &rest);
                for (rest, share) in rest.iter_mut().zip(shares) {
                    *rest -= share;
                }
            }
            room -= cut;
            cuts.push(cut);
        }
        (self.weights.iter().zip(&rest).map(|(whole, rest)| whole - rest).collect(), cuts)
    }

    fn rated(&self) -> Value {
        let whole = |amount: i128| json!(amount as i64);
        let (lost, cuts) = self.taken_off();
        let taken = [lost, cuts].map(|amounts| amounts.into_iter().map(whole).collect::<Vec<_>>());
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
            split(self.base, &self.weights).into_iter().map(whole).collect::<Vec<_>>(),
            taken,
        ])
    }
}

/// An amount split by weights: whole shares first, then one more each where the remainder is largest.
fn split(amount: i128, weights: &[i128]) -> Vec<i128> {
    let whole: i128 = weights.iter().sum();
    let mut shares: Vec<_> = weights.iter().map(|weight| amount * weight / whole).collect();
    let mut order: Vec<_> = (0..shares.len()).collect();
    order.sort_by_key(|&place| (-(amount * weights[place] % whole), place));
    let missing = amount - shares.iter().sum::<i128>();
    for &place in order.iter().take(missing as usize) {
        shares[place] += 1;
    }
    shares
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

/// A price of a deck.
#[derive(Debug)]
struct Rate {
    prefix: String,
    /// None is not sold.
    price: Option<i128>,
    connection: i128,
    minimum: i128,
    first: i128,
    next: i128,
}

impl Rate {
    fn random(dice: &mut Dice) -> Self {
        let digits = 1 + dice.roll() % 6;
        let mut prefix = "+".to_owned();
        // Few digits, so that many prefixes begin alike.
        prefix.extend((0..digits).map(|_| dice.one_of(&['1', '2', '3'])));
        let (first, next) = dice.one_of(&[(60, 60), (1, 1), (30, 6), (60, 1), (6, 6), (20, 5), (180, 60)]);
        Self {
            prefix,
            price: (!dice.roll().is_multiple_of(8)).then(|| dice.up_to(100_000_000)),
            connection: dice.one_of(&[0, 0, 1, 100_000]),
            minimum: dice.one_of(&[0, 0, 50_000, 10_000_000]),
            first,
            next,
        }
    }

    fn as_json(&self) -> Value {
        json!({
            "prefix": self.prefix, "destination": self.prefix, "price_micros": self.price.map(|price| price as i64),
            "connection_micros": self.connection as i64, "minimum_micros": self.minimum as i64,
            "initial_pulse": self.first as i64, "next_pulse": self.next as i64,
        })
    }

    /// Seconds that are charged, and the amount in sixtieths of a millionth: pulse after pulse.
    fn charge(&self, seconds: i128) -> (i128, i128) {
        let Some(price) = self.price.filter(|_| seconds > 0) else { return (0, 0) };
        let mut charged = self.first;
        while charged < seconds {
            charged += self.next;
        }
        (charged, (60 * self.connection + charged * price).max(60 * self.minimum))
    }
}

#[tokio::test]
async fn calls_are_charged_by_the_longest_prefix_and_its_pulses() -> Result<()> {
    let database = Database::migrated(supervisor_binary!()).await?;
    let sql = database.connect(Role::Owner).await?;
    let mut dice = Dice(76);
    let mut deck: Vec<Rate> = Vec::new();
    while deck.len() < 300 {
        let rate = Rate::random(&mut dice);
        if deck.iter().all(|known| known.prefix != rate.prefix) {
            deck.push(rate);
        }
    }
    let rates = Value::from(deck.iter().map(Rate::as_json).collect::<Vec<_>>());
    sql.execute("select private.set_rates('random', 'sell', 'INR', '2026-11-01', $1, now())", &[&rates]).await?;
    let calls: Vec<(String, i128)> = (0..BATCH)
        .map(|_| {
            let phone = (0..9).map(|_| dice.one_of(&['1', '2', '3', '4'])).collect::<String>();
            (format!("+{phone}"), dice.one_of(&[0, 1, 29, 30, 31, 36, 37, 59, 60, 61]) + dice.up_to(7_200))
        })
        .collect();
    let given = Value::from(calls.iter().map(|(phone, seconds)| json!([phone, *seconds as i64])).collect::<Vec<_>>());
    let rated = "select jsonb_agg(jsonb_build_array((rate.found).prefix, charged.charged_seconds, charged.amount) order by number)
        from jsonb_array_elements($1) with ordinality as call (told, number)
        cross join lateral (select private.find_rate(private.deck_version('random', '2026-11-24'), told ->> 0) as found) as rate
        cross join lateral private.rate_seconds(rate.found, (told ->> 1)::bigint) as charged";
    let rated: Value = sql.query_one(rated, &[&given]).await?.try_get(0)?;
    let mut priced = 0;
    for (place, (phone, seconds)) in calls.iter().enumerate() {
        let rate = deck.iter().filter(|rate| phone.starts_with(&rate.prefix)).max_by_key(|rate| rate.prefix.len());
        let (charged, amount) = rate.map_or((0, 0), |rate| rate.charge(*seconds));
        let expected = json!([rate.map(|rate| &rate.prefix), charged as i64, amount as i64]);
        assert_eq!(rated[place], expected, "{phone} {seconds} {rate:?}");
        priced += usize::from(amount > 0);
    }
    assert!(priced * 2 > calls.len(), "only {priced} of {} cost something", calls.len());
    Ok(())
}
