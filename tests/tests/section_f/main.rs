//! The experiments in which the seed systems fail and this one has to pass, each a test: where two meet, with sessions that meet.
//!
//! A test of experiment 3 begins with `f03_`. The other tests here are of the same kind, of what no experiment names. A test of two
//! holds the first one's transaction open until the second is seen to stand behind its lock, so that none of them hangs on luck.
//!
//! |  # | experiment                                             | proved by                                                              |
//! |---:|--------------------------------------------------------|------------------------------------------------------------------------|
//! |  1 | two orders at once and a customer's lifetime value     | `stores::f01_…`; alone: `32_stores_totals.test.sql`                    |
//! |  2 | invoice numbers at once, after deletion, under RLS     | `billing::f02_…`                                                       |
//! |  3 | two last leads end and the campaign is complete        | `campaigns::f03_…`                                                     |
//! |  4 | a cancellation does not pass through completed         | `campaigns::f04_…`                                                     |
//! |  5 | a call counts once                                     | `campaigns::f05_…`                                                     |
//! |  6 | late and reordered messages                            | `stores::f06_…`; alone: `33_stores_conversations.test.sql`             |
//! |  7 | a call's status never goes back                        | `calls::f07_…`; a store's call: `34_stores_calls.test.sql`             |
//! |  8 | no reference across organizations                      | `31_stores_tenancy.test.sql`, every foreign key: `10_core_walls.test.sql` |
//! |  9 | nobody changes their own role or organization          | `11_core_tenancy.test.sql`, `40_system_members.test.sql`               |
//! | 10 | no user moves money, no amount is negative             | `28_ledger_walls.test.sql`, `25_ledger_credit.test.sql`                |
//! | 11 | the ledger is written by its functions alone           | `28_ledger_walls.test.sql`, `25_ledger_credit.test.sql`                |
//! | 12 | usage periods neither overlap nor are negative         | `billing::f12_…`; alone: `28_ledger_walls.test.sql`                    |
//! | 13 | a worker dies after the carrier took the call          | `calls::f13_…`; the function: `dispatch/troubles.rs`                   |
//! | 14 | a callback comes before the dispatcher's commit        | `calls::f14_…`                                                         |
//! | 15 | a failed callback is replayed                          | `calls::f15_…`                                                         |
//! | 16 | `cancel` and `timeout` end a call                      | `calls::f16_…`; the carriers' words for them: `shared::telephony`      |
//! | 17 | who opted out with a retry pending                     | `calls::f17_…`                                                         |
//! | 18 | a paused campaign starves no other                     | `calls::f18_…`; three hundred rows of it: `13_core_release.test.sql`   |
//! | 19 | the calling window: minute, overnight, DST, day        | `windows::f19_…`, `12_core_basics.test.sql`, `13_core_release.test.sql` |
//! | 20 | calls at once overspend no balance                     | `billing::f20_…`, `holds::f20_…`; order of payment: `29_ledger_holds.test.sql` |
//! | 21 | a month that is anchored on the 31st                   | `20_billing_arithmetic.test.sql`, `23_billing_periods.test.sql`        |
//! | 22 | the invoice job again, years, and the boundary         | `billing::f22_…`; years: `23_billing_periods.test.sql`                 |
//! | 23 | payments replayed, of a wrong amount, failed afterwards | `billing::f23_…`; alone: `26_ledger_payments.test.sql`                 |
//! | 24 | a signature over the raw body                          | not the database's: the signatures' own tests, source by source        |
//! | 25 | installing twice                                       | `schemas.rs`, `the_master_schema_is_the_schemas_and_may_be_pasted_twice` |

mod billing;
mod calls;
mod campaigns;
mod gates;
mod holds;
mod stores;
mod turns;
mod windows;
mod world;
