// What a web app does, with the unmodified client: reads its leads, starts a campaign, reads its usage.
import { createClient } from '@supabase/supabase-js'

const { origin, key, users, campaign } = JSON.parse(process.env.TRUNKLINE)
const sent = []
const told = {}
for (const [name, jwt] of Object.entries(users)) {
  const fetchAndNote = (url, init) => {
    sent.push({ url: String(url), method: init.method, headers: [...new Headers(init.headers).keys()] })
    return fetch(url, init)
  }
  const supabase = createClient(origin, key, { accessToken: async () => jwt, global: { fetch: fetchAndNote } })
  const leads = await supabase.from('leads').select('name, phone').order('phone')
  const start = await supabase.functions.invoke(`call-dispatch/campaigns/${campaign}/start`)
  const usage = await supabase.functions.invoke('usage-metering/usage', { method: 'GET' })
  const refusal = start.error && { status: start.error.context.status, ...(await start.error.context.json()) }
  told[name] = { leads: leads.data, started: start.data, refusal, usage: usage.data, errors: [leads.error, usage.error] }
}
console.log(JSON.stringify({ told, sent }))
