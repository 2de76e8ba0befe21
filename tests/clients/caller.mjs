// A carrier's end of an agent's socket: opens it, says a second of sound as Plivo does, and hangs up. Says what came back.
import { WebSocket } from 'ws'

const { url, forged } = JSON.parse(process.env.CALL)
const told = { forged: 0, sounds: 0, bytes: 0 }
const refused = (address) => new Promise((done) => {
  const socket = new WebSocket(address)
  socket.on('unexpected-response', (_, response) => done(response.statusCode))
  socket.on('error', () => done(0))
  socket.on('open', () => done(101))
})
told.forged = await refused(forged)

await new Promise((done, fail) => {
  const socket = new WebSocket(url)
  socket.on('error', fail)
  socket.on('open', async () => {
    told.second = await refused(url)
    socket.send(JSON.stringify({ event: 'start', start: { callId: 'c', streamId: 's' } }))
    for (let at = 0; at < 50; at += 1)
      socket.send(JSON.stringify({ event: 'media', media: { payload: Buffer.alloc(160, 0x7f).toString('base64') } }))
    socket.send(JSON.stringify({ event: 'stop' }))
  })
  socket.on('message', (data) => {
    const { event, media } = JSON.parse(data)
    if (event !== 'playAudio') return
    told.sounds += 1
    told.bytes += Buffer.from(media.payload, 'base64').length
  })
  socket.on('close', done)
})
console.log(JSON.stringify(told))
