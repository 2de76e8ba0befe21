// What a web app writes against the generated types. It is compiled and never run: each `@ts-expect-error` is a mistake that the
// types have to catch, and each `exact` a type that has to be this one and no wider.
import { createClient } from '@supabase/supabase-js'
import type { Database, Enums, Tables, TablesInsert } from './types'

const supabase = createClient<Database>('http://localhost', 'sb_publishable_key')

type Same<A, B> = (<T>() => T extends A ? 1 : 2) extends <T>() => T extends B ? 1 : 2 ? true : false
const exact = <Wanted>() => <Given>(_given: Given, ..._proof: Same<Wanted, Given> extends true ? [] : [never]) => undefined

export async function readsLeads() {
  const { data } = await supabase.from('leads').select('name, phone, score, call_status, created_at, stage:pipeline_stages(name)')
  for (const lead of data ?? []) {
    exact<string>()(lead.name)
    exact<string | null>()(lead.phone)
    exact<number>()(lead.score)
    exact<Enums<'call_outcome'> | null>()(lead.call_status)
    exact<string>()(lead.created_at)
    // Which table a foreign key leads to is in the types too: one stage, or none.
    exact<{ name: string } | null>()(lead.stage)
    // @ts-expect-error this column was not asked for
    lead.email
  }
  // @ts-expect-error no such table
  await supabase.from('leeds').select()
  const wrong = await supabase.from('leads').select('name, telephone')
  // @ts-expect-error no such column: what was asked for cannot be read as a lead
  wrong.data?.[0]?.name
  // @ts-expect-error a status of a campaign is one of its enum
  await supabase.from('campaigns').select('id').eq('status', 'flying')
  await supabase.from('campaigns').select('id').eq('status', 'running')
}

export async function writesLeads() {
  await supabase.from('leads').insert({ name: 'Asha', phone: '+919812000001', score: 7 })
  // @ts-expect-error a lead has a name
  await supabase.from('leads').insert({ phone: '+919812000001' })
  // @ts-expect-error a score is a number
  await supabase.from('leads').insert({ name: 'Asha', score: 'high' })
  // @ts-expect-error a name may be changed, not removed
  await supabase.from('leads').update({ name: null }).eq('id', '')
  const project: TablesInsert<'projects'> = { name: 'Sunset Villas' }
  await supabase.from('projects').insert(project)
  // @ts-expect-error no such kind of property
  await supabase.from('properties').insert({ title: 'A flat', type: 7, price_minor: 1 })
}

export async function callsFunctions() {
  const allowed = await supabase.rpc('auth_has_permission', { permission: 'lead.view' })
  exact<boolean | null>()(allowed.data)
  const role = await supabase.rpc('get_auth_system_role')
  exact<Enums<'system_role'> | null>()(role.data)
  await supabase.rpc('create_campaign', { name: 'Diwali' })
  // @ts-expect-error a campaign has a name
  await supabase.rpc('create_campaign', {})
  // @ts-expect-error no such argument
  await supabase.rpc('cancel_campaign', { campaign: '' })
  // @ts-expect-error no such function
  await supabase.rpc('delete_everything')
}

export function showsAnInvoice(invoice: Tables<'invoices'>): [number, string] {
  exact<number>()(invoice.total_minor)
  exact<Enums<'invoice_status'>>()(invoice.status)
  // Money is in minor units: there is no amount to be taken for rupees.
  // @ts-expect-error no such column
  invoice.amount
  return [invoice.total_minor, invoice.currency]
}
