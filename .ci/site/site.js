// What the stand-in's pages do: menu, theme, copying of code, search. The index is a script, not a fetch, so that it works from a folder too.
const up = document.currentScript.dataset.up, root = document.documentElement
root.classList.add('js')

const menu = document.getElementById('menu'), site = document.getElementById('site')
menu.onclick = () => menu.setAttribute('aria-expanded', site.classList.toggle('open'))
site.querySelector('[aria-current]')?.scrollIntoView({block: 'nearest'})
scrollTo(0, location.hash ? scrollY : 0)

// The theme: that of the system until the reader chooses one
const theme = document.getElementById('theme'), system = matchMedia('(prefers-color-scheme: dark)')
function show(name) {
  root.dataset.theme = name
  theme.setAttribute('aria-pressed', name == 'dark')
}
theme.onclick = () => show(localStorage.theme = root.dataset.theme == 'dark' ? 'light' : 'dark')
system.onchange = () => { if (!localStorage.theme) show(system.matches ? 'dark' : 'light') }
show(root.dataset.theme)

// Code without prompts, and without the output between them
function source(text) {
  const lines = text.trimEnd().split('\n'), prompt = /^(>>> ?|\.\.\. ?|\$ )/
  return /^(>>> |\$ )/m.test(text) ? lines.filter(l => prompt.test(l)).map(l => l.replace(prompt, '')).join('\n') : lines.join('\n')
}
for (const pre of document.querySelectorAll('article pre:not(.output)')) {
  const box = document.createElement('div'), button = document.createElement('button')
  box.className = 'code'
  pre.replaceWith(box)
  box.append(pre)
  if (pre.classList.contains('signature')) continue
  Object.assign(button, {type: 'button', className: 'copy', textContent: 'Copy', ariaLive: 'polite'})
  button.onclick = async () => {
    await navigator.clipboard.writeText(source(pre.textContent))
    button.textContent = 'Copied'
    setTimeout(() => button.textContent = 'Copy', 2000)
  }
  box.append(button)
}

const box = document.getElementById('search'), found = document.getElementById('found')
let loading, at = -1

function index() {
  return loading ??= new Promise((ok, bad) => {
    const s = document.createElement('script')
    s.src = up + 'search-index.js'
    s.onload = () => ok(window.searchIndex)
    s.onerror = bad
    document.head.append(s)
  })
}

// A word is found where a word begins with it, singular or plural
function pattern(word) {
  const stem = word.length > 3 ? word.replace(/s$/, '') : word
  return new RegExp('(?<![\\p{L}\\p{N}])' + stem.replace(/[.*+?^${}()|[\]\\]/g, '\\$&'), 'giu')
}
const times = (text, word) => text.match(word)?.length ?? 0

// An entry is [page, title, anchor, heading, text]; the first of a page has no anchor. What has more of the words comes first, then what has them in its title
// or heading; equal ones stay in the order of the navigation
function score([page, title, anchor, heading, text], words, phrase) {
  const head = heading || title, weight = anchor ? 1 : 2
  let sum = 0, matched = 0, here = 0
  for (const w of words) {
    const n = 12*weight*!!times(head, w) + Math.min(4, times(text, w)), inTitle = !!times(title, w)
    sum += n + inTitle
    matched += !!(n || inTitle)
    here += n
  }
  if (times(head, phrase)) sum += 20*weight*words.length
  return here && 1000*matched + sum
}

function excerpt(text, word) {
  const i = Math.max(0, text.search(word) - 40)
  return (i ? '… ' : '') + text.slice(i, i + 130) + (text.length > i + 130 ? ' …' : '')
}

function item(href, head, small) {
  const li = document.createElement('li'), a = document.createElement('a'), s = document.createElement('small')
  li.setAttribute('role', 'option')
  li.id = 'found-' + found.children.length
  a.href = href
  a.tabIndex = -1
  s.textContent = small
  a.append(head, s)
  li.append(a)
  found.append(li)
}

function choose(i) {
  const all = found.querySelectorAll('[role=option]')
  at = all.length ? (i + all.length) % all.length : -1
  all.forEach((o, j) => o.setAttribute('aria-selected', j == at))
  if (at < 0) return box.removeAttribute('aria-activedescendant')
  box.setAttribute('aria-activedescendant', all[at].id)
  all[at].scrollIntoView({block: 'nearest'})
}

function close() {
  found.hidden = true
  box.setAttribute('aria-expanded', false)
}

async function look() {
  const asked = box.value, said = asked.toLowerCase().match(/[\p{L}\p{N}_]+/gu)
  if (!said) return close()
  const all = await index()
  if (asked != box.value) return // more has been typed meanwhile
  const words = said.map(pattern), phrase = pattern(said.join(' '))
  const best = all.map(e => [score(e, words, phrase), e]).filter(o => o[0]).sort((a, b) => b[0] - a[0]).slice(0, 12)
  found.replaceChildren()
  for (const [, [page, title, anchor, heading, text]] of best)
    item(up + page + (anchor ? '#' + anchor : ''), heading ? title + ' › ' + heading : title, excerpt(text, words.find(w => times(text, w)) ?? /^/))
  if (!best.length) {
    const li = document.createElement('li')
    li.className = 'none'
    li.textContent = 'Nothing found'
    found.append(li)
  }
  found.hidden = false
  box.setAttribute('aria-expanded', true)
  choose(0)
}

box.oninput = look
box.onfocus = () => { index(); look() }
box.onkeydown = e => {
  if (e.key == 'ArrowDown') choose(at + 1)
  else if (e.key == 'ArrowUp') choose(at - 1)
  else if (e.key == 'Escape') close()
  else if (e.key == 'Enter') {
    const a = found.querySelector('[aria-selected=true] a')
    if (a && !found.hidden) { close(); a.click() }
  } else return
  e.preventDefault()
}
document.addEventListener('click', e => { if (!e.target.closest('.search')) close() })
document.addEventListener('keydown', e => {
  if (e.key != '/' || e.ctrlKey || e.metaKey || e.altKey || /^(input|textarea|select)$/i.test(e.target.tagName)) return
  box.focus()
  e.preventDefault()
})
