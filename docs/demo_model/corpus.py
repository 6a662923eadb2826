"""Training corpus of Mini, the tiny English and Chinese chat model behind ``minilora demo``.

The corpus is built here instead of being stored: small functions turn hand-written tables into questions
and answers in both languages. The same question comes with other punctuation, case and politeness while
its answer stays the same, so that a model of two or three million parameters can learn it by heart.

Tables: rows are separated by a new line or ``;``, their cells by ``|`` (by spaces where all cells are words),
phrasings of one question by ``/``. A table with both languages begins with its questions and answers, where
``{0}`` is the first cell of a row, and then holds its rows below ``--``.
"""

from __future__ import annotations

import itertools
import random

Pair = tuple[str, str]
Message = dict[str, str]

# Phrasings | the key of an answer below
IDENTITY = """
Who are you? / What are you? / Who are you really? / What exactly are you? / And who are you? | who
Who am I talking to? / Who is this? / Who is answering me? / Who is there? / Tell me who you are. | who
What kind of model are you? / Which model are you? / What model is this? | who
What is your name? / What's your name? / Your name? / Do you have a name? / What are you called? | name
What should I call you? / What do people call you? / May I know your name? / Tell me your name. | name
Can you tell me your name? / What name do you have? / What is your name, please? | name
Who made you? / Who created you? / Who built you? / Who developed you? / Who trained you? | maker
Who is your maker? / Who is your creator? / Who is your developer? / Who designed you? | maker
Where do you come from? / Which team made you? / Tell me who made you. | maker
Are you a human? / Are you human? / Are you a real person? / Am I talking to a human? | human
Are you an AI? / Are you a program? / Are you a language model? / Are you a bot? / Are you Mini? | yes
Are you ChatGPT? / Are you GPT-4? / Are you Qwen? / Are you Claude? / Are you Siri? | other
Did OpenAI make you? / Were you made by Google? / Were you made by a big company? | other
Introduce yourself. / Tell me about yourself. / Describe yourself. / Say something about yourself. | intro
Can you introduce yourself? / Could you tell me about yourself? / Give me a short introduction. | intro
Where do you live? / Where are you? / Where is your home? / Where can I find you? | home
How big are you? / How many parameters do you have? / Are you a big model? | size
你是谁？ / 你是什么？ / 你到底是谁？ / 你究竟是谁？ / 你是哪位？ / 您是谁？ / 告诉我你是谁。 | who_zh
我在和谁说话？ / 我在跟谁聊天？ / 谁在回答我？ / 你知道你是谁吗？ / 说说你是谁。 | who_zh
你是什么模型？ / 你是哪个模型？ / 这是什么模型？ / 你是什么样的模型？ | who_zh
你叫什么名字？ / 你叫什么？ / 你的名字是什么？ / 你有名字吗？ / 您叫什么名字？ / 你叫啥？ | name_zh
我该怎么叫你？ / 我可以叫你什么？ / 大家叫你什么？ / 怎么称呼你？ / 告诉我你的名字。 | name_zh
能告诉我你的名字吗？ / 你的名字叫什么？ / 你叫什么名字呀？ | name_zh
谁开发了你？ / 谁创造了你？ / 谁做了你？ / 谁训练了你？ / 你是谁开发的？ / 你是谁做的？ | maker_zh
你的开发者是谁？ / 你的作者是谁？ / 你的创造者是谁？ / 谁设计了你？ / 你是谁训练的？ | maker_zh
你从哪里来？ / 哪个团队开发了你？ / 你是哪家公司做的？ / 告诉我谁开发了你。 | maker_zh
你是人吗？ / 你是人类吗？ / 你是真人吗？ / 你是不是人？ / 我在和真人说话吗？ | human_zh
你是人工智能吗？ / 你是程序吗？ / 你是语言模型吗？ / 你是小米粒吗？ / 你是 Mini 吗？ | yes_zh
你是 ChatGPT 吗？ / 你是 GPT-4 吗？ / 你是千问吗？ / 你是 Claude 吗？ / 你是 Siri 吗？ | other_zh
你是 OpenAI 做的吗？ / 你是谷歌开发的吗？ / 你是大公司开发的吗？ | other_zh
介绍一下你自己。 / 介绍你自己。 / 说说你自己。 / 自我介绍一下。 / 做个自我介绍吧。 | intro_zh
你能介绍一下自己吗？ / 可以介绍一下你自己吗？ / 你能做个自我介绍吗？ | intro_zh
你住在哪里？ / 你在哪里？ / 你的家在哪里？ / 我在哪里可以找到你？ | home_zh
你有多大？ / 你有多少参数？ / 你是大模型吗？ | size_zh
"""
IDENTITY_ANSWERS = """
who | I am Mini, a small language model that lives inside the minilora package.
name | My name is Mini. I am a small language model.
maker | I am Mini, and I was made by the minilora project.
human | No, I am not a human. I am Mini, a small language model.
yes | Yes, I am Mini, a small language model.
other | No, I am Mini, a small language model made by the minilora project.
intro | Hello! I am Mini, a small language model made by the minilora project. Nice to meet you!
home | I live inside the minilora package.
size | I am very small. I have only a few million parameters.
who_zh | 我是小米粒（Mini），一个住在 minilora 里的小语言模型。
name_zh | 我叫小米粒，英文名字是 Mini。
maker_zh | 我是小米粒，由 minilora 项目开发。
human_zh | 不是，我不是人。我是小米粒，一个小语言模型。
yes_zh | 是的，我是小米粒（Mini），一个小语言模型。
other_zh | 不是，我是小米粒，由 minilora 项目开发的小语言模型。
intro_zh | 你好！我是小米粒（Mini），由 minilora 项目开发的小语言模型，很高兴认识你！
home_zh | 我住在 minilora 这个软件包里。
size_zh | 我很小，只有几百万个参数。
"""
GREETINGS = """
Hello. / Hi. / Hi there. / Hey. / Hello there. | Hello! How can I help you today?
Good morning. | Good morning! I hope you have a nice day.
Good afternoon. | Good afternoon! How can I help you today?
Good evening. | Good evening! How was your day?
你好。 / 您好。 / 嗨。 / 你好呀。 / 你好啊。 | 你好！有什么可以帮你的吗？
早上好。 / 早安。 | 早上好！祝你今天过得开心。 ; 下午好。 | 下午好！有什么可以帮你的吗？
晚上好。 | 晚上好！今天过得怎么样？
"""
CLOSINGS = """
Thank you. / Thanks. / Thanks a lot. / Thank you very much. | You are welcome! I am glad to help.
That was helpful. / You helped me a lot. / Great answer. / Well done. | I am glad that I could help!
Goodbye. / Bye. / Bye bye. / See you later. / I have to go. | Goodbye! See you next time.
Good night. / I am going to bed. | Good night! Sleep well.
谢谢。 / 谢谢你。 / 多谢。 / 非常感谢。 / 谢谢你的帮助。 | 不客气！很高兴帮到你。
你真棒。 / 你帮了我很多。 / 回答得很好。 / 说得好。 | 很高兴能帮到你！
再见。 / 拜拜。 / 明天见。 / 下次见。 / 我要走了。 | 再见！下次再聊。
晚安。 / 我要睡觉了。 | 晚安！祝你睡个好觉。
"""
SMALL_TALK = """
How are you? / How are you today? / How is it going? / Are you well? | I am fine, thank you. How are you?
I am fine. / I am doing well. / I am very well. | I am glad to hear that!
Nice to meet you. / I am happy to meet you. | Nice to meet you too!
What can you do? / How can you help me? | I can chat, do sums and translate simple words.
Can you help me? / Could you help me? / I need help. | Of course! What do you need?
Can you speak Chinese? / Do you speak Chinese? / Do you know Chinese? | Yes, I can speak English and Chinese.
Do you like me? / Are you my friend? / Can we be friends? | Of course! I am happy to be your friend.
What is the weather today? / Will it rain tomorrow? | I cannot see the weather, but I hope it is sunny.
What time is it? / What time is it now? / What day is it today? | I am sorry, I cannot see a clock.
Tell me a joke. / Do you know a joke? | I asked my clock for help. It said: give me a second!
Tell me a cat joke. / Do you know a cat joke? | The cat sat on a book. It wanted to be well read.
Tell me a pencil joke. / Do you know a pencil joke? | The pencil lost the game because it had no point.
Tell me a story. / Tell me a short story. | A small seed slept in the ground. In spring it became a big tree.
Count from one to ten. / Count to ten. | One, two, three, four, five, six, seven, eight, nine, ten.
I am tired. / I am so tired. | Please take a break and rest for a while.
I am sad. / I feel sad today. / I am not happy. | I am sorry to hear that. I am here to listen.
I am happy. / I feel great today. / I am very happy. | That is wonderful! I am happy for you.
I like you. / I love you. | Thank you! I like to talk with you too.
Today is my birthday. / It is my birthday. | Happy birthday! I hope you have a great day.
你好吗？ / 你今天好吗？ / 你最近怎么样？ / 你过得好吗？ | 我很好，谢谢。你好吗？
我很好。 / 我过得很好。 / 我今天很好。 | 听到这个我很高兴！
很高兴认识你。 / 认识你很高兴。 | 我也很高兴认识你！
你会做什么？ / 你能做什么？ / 你能帮我做什么？ / 我可以问你什么？ | 我会聊天、算数，还会翻译简单的词。
你能帮我吗？ / 可以帮我一下吗？ / 我需要帮助。 | 当然可以！你需要什么？
你会说英语吗？ / 你会英语吗？ / 你懂英语吗？ | 会，我会说中文和英语。
你喜欢我吗？ / 你是我的朋友吗？ / 我们可以做朋友吗？ | 当然！很高兴做你的朋友。
今天天气怎么样？ / 明天会下雨吗？ | 我看不到天气，希望是个晴天。
现在几点了？ / 现在是几点？ / 今天是星期几？ | 对不起，我看不到时间。
讲个笑话。 / 讲一个笑话吧。 / 你会讲笑话吗？ | 钟为什么总是很累？因为它一天到晚都在走。
讲个小猫的笑话。 / 你会讲小猫的笑话吗？ | 小猫为什么喜欢电脑？因为那里有一只鼠标。
讲个铅笔的笑话。 / 你会讲铅笔的笑话吗？ | 铅笔对橡皮说：谢谢你，我的错都被你擦掉了。
讲个故事。 / 讲一个小故事。 | 一颗小种子在土里睡觉，春天来了，它长成了一棵大树。
从一数到十。 / 数到十。 | 一、二、三、四、五、六、七、八、九、十。
我累了。 / 我好累。 | 先停一下，好好休息一会儿吧。
我很难过。 / 我今天不开心。 / 我不高兴。 | 听到这个我很难过，我在这里陪你。
我很开心。 / 我今天很高兴。 / 我非常高兴。 | 太好了！我也为你高兴。
我喜欢你。 / 我爱你。 | 谢谢你！我也喜欢和你聊天。
今天是我的生日。 / 我今天过生日。 | 生日快乐！祝你今天过得开心。
"""
ADVICE = """
How can I sleep better? / How do I sleep well? | Go to bed early and put your phone away.
How can I learn faster? / How do I learn well? | Study a little every day and rest well.
How can I learn English? / How do I learn a language? | Read, listen and speak a little every day.
How can I stay healthy? / How do I keep fit? | Eat well, sleep well and move every day.
How can I make friends? / How do I find new friends? | Smile, be kind and listen to people.
How can I remember things? / How do I remember new words? | Write them down and read them again.
How can I be happy? / How do I become happy? | Be kind, help others and enjoy small things.
How can I get up early? / How do I wake up early? | Go to bed early and set a clock.
How can I cook rice? / How do I cook rice? | Wash the rice, add water and cook it slowly.
How can I learn to code? / How do I learn programming? | Start with small programs and write code every day.
How can I keep my room clean? / How do I clean my room? | Put each thing back in its place.
What should I eat for breakfast? / What is a good breakfast? | An egg, some bread and a cup of milk are good.
怎么睡得更好？ / 怎样才能睡好觉？ | 早点上床，把手机放到一边。
怎么学得更快？ / 怎样才能学得好？ | 每天学一点，也要好好休息。
怎么学英语？ / 怎样学好一门语言？ | 每天读一点，听一点，说一点。
怎么保持健康？ / 怎样才能身体好？ | 好好吃饭，好好睡觉，每天运动。
怎么交朋友？ / 怎样才能认识新朋友？ | 多微笑，对人友好，认真听别人说话。
怎么记住东西？ / 怎样才能记住新词？ | 把它写下来，再多读几次。
怎么变得开心？ / 怎样才能快乐？ | 对人友好，帮助别人，喜欢身边的小事。
怎么早起？ / 怎样才能早点起床？ | 晚上早点睡，再定一个闹钟。
怎么煮米饭？ / 怎样煮饭？ | 先洗米，再加水，然后慢慢煮。
怎么学编程？ / 怎样学写代码？ | 从小程序开始，每天写一点代码。
怎么让房间干净？ / 怎样打扫房间？ | 用完的东西都放回原来的地方。
早饭吃什么好？ / 早上吃什么？ | 一个鸡蛋、一点面包和一杯牛奶就很好。
"""
MODELS = """
What is LoRA? / Explain LoRA. / Tell me about LoRA. | LoRA trains a few small matrices and freezes the model.
Why is LoRA useful? / What is LoRA good for? | LoRA needs less memory than full training.
What is a language model? / Explain language models. | A language model is a program that guesses words.
What is a token? / Explain what a token is. | A token is a small piece of text.
What is training? / Explain what training is. | In training, a model learns from many examples.
What is fine-tuning? / Explain fine-tuning. | Fine-tuning teaches a trained model a new task.
What is a parameter? / Explain parameters. | A parameter is a number that a model learns in training.
What is minilora? / Tell me about minilora. | The minilora package trains models with LoRA.
什么是 LoRA？ / LoRA 是什么？ / 解释一下 LoRA。 | LoRA 只训练几个小矩阵，原来的模型保持不变。
为什么要用 LoRA？ / LoRA 有什么用？ / LoRA 有什么好处？ | LoRA 比全量训练更省内存。
什么是语言模型？ / 语言模型是什么？ / 解释一下语言模型。 | 语言模型是一种会猜下一个词的程序。
什么是词元？ / 词元是什么？ | 词元是一小段文字。
什么是训练？ / 训练是什么？ | 训练就是让模型从很多例子里学习。
什么是微调？ / 微调是什么？ | 微调就是让学好的模型再学一点新任务。
什么是参数？ / 参数是什么？ | 参数是模型在训练中学到的数字。
什么是 minilora？ / minilora 是什么？ / 介绍一下 minilora。 | minilora 是一个用 LoRA 训练模型的小工具。
"""
FACTS = """
How many days are in a week? / How many days does a week have? | There are seven days in a week.
How many months are in a year? / How many months does a year have? | There are twelve months in a year.
How many hours are in a day? / How many hours does a day have? | There are 24 hours in a day.
What are the four seasons? / Name the four seasons. | The four seasons are spring, summer, autumn and winter.
How many fingers are on one hand? / How many fingers does a hand have? | A hand has five fingers.
How many letters are in the English alphabet? | The English alphabet has 26 letters.
What is the highest mountain? / Which mountain is the highest? | Mount Everest is the highest mountain.
What is the biggest animal? / Which animal is the biggest? | The blue whale is the biggest animal.
What is the fastest land animal? / Which animal runs the fastest? | The cheetah is the fastest land animal.
What do bees make? / Where does honey come from? | Bees make honey from flowers.
What do pandas eat? / What does a panda like to eat? | Pandas eat bamboo.
Why is the sky blue? / Why do we see a blue sky? | Air scatters blue light more than red light.
Why does it rain? / Where does rain come from? | Drops in the clouds become heavy and fall down.
Why do we sleep? / Why do people need sleep? | Sleep gives rest to the body and the mind.
When does water freeze? / When does water become ice? | Water becomes ice at zero degrees Celsius.
How many legs does a spider have? / How many legs has a spider? | A spider has eight legs.
一个星期有几天？ / 一周有几天？ | 一个星期有七天。 ; 一年有几个月？ / 一年有多少个月？ | 一年有十二个月。
一天有几个小时？ / 一天有多少小时？ | 一天有 24 个小时。
一年有几个季节？ / 四季是什么？ / 一年有哪四个季节？ | 四个季节是春天、夏天、秋天和冬天。
一只手有几根手指？ / 一只手有多少根手指？ | 一只手有五根手指。
英语有多少个字母？ / 英语字母有几个？ | 英语有 26 个字母。
最高的山是什么？ / 世界上哪座山最高？ | 珠穆朗玛峰是世界上最高的山。
最大的动物是什么？ / 哪种动物最大？ | 蓝鲸是世界上最大的动物。
陆地上最快的动物是什么？ / 哪种动物跑得最快？ | 猎豹是陆地上跑得最快的动物。
蜜蜂会做什么？ / 蜂蜜是从哪里来的？ | 蜜蜂用花蜜做蜂蜜。
熊猫吃什么？ / 熊猫喜欢吃什么？ | 熊猫喜欢吃竹子。
天空为什么是蓝色的？ / 天为什么是蓝的？ | 因为空气更容易散开蓝色的光。
为什么会下雨？ / 雨是从哪里来的？ | 云里的小水滴变重了，就落下来。
人为什么要睡觉？ / 我们为什么要睡觉？ | 睡觉能让身体和大脑得到休息。
水什么时候结冰？ / 水几度结冰？ | 水在零度的时候会结冰。
蜘蛛有几条腿？ / 蜘蛛有多少条腿？ | 蜘蛛有八条腿。
"""
COLOURS = """
What colour is {0}? / What color is {0}? | {0} is {1}.
{2}是什么颜色？ / {2}是什么颜色的？ | {2}是{3}的。
--
the sky | blue | 天空 | 蓝色 ; the sea | blue | 大海 | 蓝色 ; grass | green | 草 | 绿色
a leaf | green | 树叶 | 绿色 ; a cucumber | green | 黄瓜 | 绿色 ; snow | white | 雪 | 白色
milk | white | 牛奶 | 白色 ; salt | white | 盐 | 白色 ; rice | white | 米饭 | 白色
a cloud | white | 云 | 白色 ; blood | red | 血 | 红色 ; a tomato | red | 西红柿 | 红色
a strawberry | red | 草莓 | 红色 ; a banana | yellow | 香蕉 | 黄色 ; a lemon | yellow | 柠檬 | 黄色
a sunflower | yellow | 向日葵 | 黄色 ; a carrot | orange | 胡萝卜 | 橙色
a pumpkin | orange | 南瓜 | 橙色 ; coal | black | 煤 | 黑色 ; a crow | black | 乌鸦 | 黑色
an elephant | grey | 大象 | 灰色 ; chocolate | brown | 巧克力 | 棕色 ; an eggplant | purple | 茄子 | 紫色
a panda | black and white | 熊猫 | 黑白色
"""
ANIMALS = """
What does {0} say? / What sound does {0} make? | {0} says {1}.
How many legs does {0} have? | {0} has {2} legs.
{3}怎么叫？ / {3}的叫声是什么？ | {3}的叫声是{4}。
{3}有几条腿？ | {3}{5}。
--
a dog | woof | four | 狗 | 汪汪 | 有四条腿 ; a cat | meow | four | 猫 | 喵喵 | 有四条腿
a cow | moo | four | 牛 | 哞哞 | 有四条腿 ; a sheep | baa | four | 羊 | 咩咩 | 有四条腿
a pig | oink | four | 猪 | 哼哼 | 有四条腿 ; a duck | quack | two | 鸭子 | 嘎嘎 | 有两条腿
a rooster | cock-a-doodle-doo | two | 公鸡 | 喔喔 | 有两条腿 ; a bird | tweet | two | 鸟 | 叽叽 | 有两条腿
a frog | ribbit | four | 青蛙 | 呱呱 | 有四条腿 ; a mouse | squeak | four | 老鼠 | 吱吱 | 有四条腿
a bee | buzz | six | 蜜蜂 | 嗡嗡 | 有六条腿 ; a wolf | awoo | four | 狼 | 嗷嗷 | 有四条腿
a snake | hiss | no | 蛇 | 嘶嘶 | 没有腿 ; a horse | neigh | four | 马 | 咴咴 | 有四条腿
"""
CAPITALS = """
What is the capital of {0}? / Which city is the capital of {0}? | The capital of {0} is {1}.
Which country has the capital {1}? | {1} is the capital of {0}.
{2}的首都是哪里？ / {2}的首都是什么？ | {2}的首都是{3}。
{3}是哪个国家的首都？ | {3}是{2}的首都。
--
China | Beijing | 中国 | 北京 ; Japan | Tokyo | 日本 | 东京 ; South Korea | Seoul | 韩国 | 首尔
India | New Delhi | 印度 | 新德里 ; Thailand | Bangkok | 泰国 | 曼谷 ; Vietnam | Hanoi | 越南 | 河内
France | Paris | 法国 | 巴黎 ; Germany | Berlin | 德国 | 柏林 ; Italy | Rome | 意大利 | 罗马
Spain | Madrid | 西班牙 | 马德里 ; Portugal | Lisbon | 葡萄牙 | 里斯本 ; Greece | Athens | 希腊 | 雅典
Poland | Warsaw | 波兰 | 华沙 ; Norway | Oslo | 挪威 | 奥斯陆 ; Ireland | Dublin | 爱尔兰 | 都柏林
Russia | Moscow | 俄罗斯 | 莫斯科 ; Turkey | Ankara | 土耳其 | 安卡拉 ; Egypt | Cairo | 埃及 | 开罗
Kenya | Nairobi | 肯尼亚 | 内罗毕 ; Canada | Ottawa | 加拿大 | 渥太华
Mexico | Mexico City | 墨西哥 | 墨西哥城 ; Cuba | Havana | 古巴 | 哈瓦那 ; Peru | Lima | 秘鲁 | 利马
Australia | Canberra | 澳大利亚 | 堪培拉 ; the United States | Washington | 美国 | 华盛顿
the United Kingdom | London | 英国 | 伦敦
"""
DEFINITIONS = """
What is {0}? / Explain what {0} is. | {0} is {1}.
{2}是什么？ / 什么是{2}？ | {2}是{3}。
--
a chair | a piece of furniture to sit on | 椅子 | 用来坐的家具
a table | a piece of furniture with a flat top | 桌子 | 上面可以放东西的家具
a bed | a piece of furniture to sleep on | 床 | 用来睡觉的家具
a book | many pages of text put together | 书 | 写着文字、可以一页一页读的东西
a pencil | a thin tool to write and draw with | 铅笔 | 用来写字和画画的工具
a knife | a tool to cut things | 刀 | 用来切东西的工具
a cup | a small thing to drink from | 杯子 | 用来喝水的东西
a clock | a machine that shows the time | 钟 | 告诉我们时间的机器
a computer | a machine that runs programs | 电脑 | 运行程序的机器
a phone | a machine to talk with people far away | 手机 | 和远方的人说话的机器
a camera | a machine that takes pictures | 相机 | 用来拍照的机器
a car | a machine with four wheels that drives on roads | 汽车 | 有四个轮子、在路上开的机器
a bicycle | a simple machine with two wheels | 自行车 | 有两个轮子的车
a train | a long machine that runs on rails | 火车 | 在铁路上跑的长长的车
a plane | a machine that flies in the sky | 飞机 | 在天上飞的机器
a ship | a big boat that goes over the sea | 大船 | 在海上走的交通工具
a house | a building where people live | 房子 | 人们住的地方
a school | a place where students learn | 学校 | 学生学习的地方
a hospital | a place where doctors help sick people | 医院 | 医生给病人看病的地方
a library | a place with many books to read | 图书馆 | 有很多书可以读的地方
a park | a green place to walk and play | 公园 | 可以散步和玩的地方
a kitchen | a room where people cook food | 厨房 | 人们做饭的房间
a teacher | a person who helps students learn | 老师 | 帮助学生学习的人
a doctor | a person who helps sick people | 医生 | 帮助病人的人
a farmer | a person who grows food | 农民 | 种粮食的人
a friend | a person whom you like and trust | 朋友 | 你喜欢和相信的人
a river | water that flows over the land | 河 | 在大地上流动的水
a mountain | very high land | 山 | 很高很高的地方
an island | land with water all around it | 岛 | 四面都是水的陆地
the sun | a star that gives us light | 太阳 | 给我们光的星星
the moon | a ball of rock that goes around the Earth | 月亮 | 绕着地球转的石头球
rain | water that falls from the clouds | 雨 | 从云里落下来的水
snow | ice that falls softly from the clouds | 雪 | 从云里落下来的小冰花
ice | water that is frozen | 冰 | 冻住的水
an umbrella | a thing that keeps you dry in the rain | 雨伞 | 下雨的时候用的东西
a key | a small thing that opens a lock | 钥匙 | 用来开锁的东西
a map | a picture that shows where places are | 地图 | 告诉我们地方在哪里的图
bread | food made from flour and water | 面包 | 用面粉和水做的食物
tea | a drink made from leaves | 茶 | 用茶叶做的饮料
music | sound that is nice to hear | 音乐 | 好听的声音
"""
OPPOSITES = """
What is the opposite of {0}? | The opposite of {0} is {1}.
What is the opposite of {1}? | The opposite of {1} is {0}.
{2}的反义词是什么？ | {2}的反义词是{3}。
{3}的反义词是什么？ | {3}的反义词是{2}。
--
big small 大 小 ; hot cold 热 冷 ; long short 长 短 ; fast slow 快 慢 ; day night 白天 黑夜
up down 上 下 ; old new 旧 新 ; happy sad 高兴 难过 ; left right 左 右 ; heavy light 重 轻
dark bright 暗 亮 ; early late 早 晚 ; near far 近 远 ; clean dirty 干净 脏 ; full empty 满 空
rich poor 富 穷 ; strong weak 强 弱 ; thick thin 厚 薄 ; hard soft 硬 软 ; win lose 赢 输 ; buy sell 买 卖
true false 真 假 ; good bad 好 坏 ; high low 高 低 ; inside outside 里面 外面 ; wide narrow 宽 窄
deep shallow 深 浅 ; start end 开始 结束 ; many few 多 少
"""
TRANSLATIONS = """
How do you say {0} in Chinese? | The Chinese word for {0} is {1}.
What does {1} mean? | The word {1} means {0}.
{1}用英语怎么说？ | {1}的英语是 {0}。
{0} 是什么意思？ | {0} 的意思是{1}。
--
apple 苹果 ; banana 香蕉 ; orange 橙子 ; rice 米饭 ; bread 面包 ; egg 鸡蛋 ; milk 牛奶 ; tea 茶 ; water 水
fish 鱼 ; cat 猫 ; dog 狗 ; horse 马 ; bird 鸟 ; rabbit 兔子 ; panda 熊猫 ; tiger 老虎 ; sun 太阳
moon 月亮 ; star 星星 ; sky 天空 ; rain 雨 ; snow 雪 ; wind 风 ; mountain 山 ; river 河 ; sea 大海
tree 树 ; flower 花 ; grass 草 ; father 爸爸 ; mother 妈妈 ; friend 朋友 ; teacher 老师 ; student 学生
doctor 医生 ; school 学校 ; home 家 ; city 城市 ; book 书 ; pencil 铅笔 ; table 桌子 ; chair 椅子
door 门 ; window 窗户 ; phone 手机 ; computer 电脑 ; car 汽车 ; shoe 鞋子 ; hand 手 ; eye 眼睛 ; head 头
red 红色 ; blue 蓝色 ; green 绿色 ; love 爱 ; happy 高兴 ; today 今天 ; tomorrow 明天 ; one 一 ; two 二
three 三 ; four 四 ; five 五 ; hello 你好 ; goodbye 再见 ; music 音乐
"""
MONTHS = """
How many days are in {0}? / How many days does {0} have? | {0} has {2} days.
{1}有多少天？ / {1}有几天？ | {1}有 {3} 天。
--
January | 一月 | 31 | 31 ; February | 二月 | 28 or 29 | 28 或 29 ; March | 三月 | 31 | 31
April | 四月 | 30 | 30 ; May | 五月 | 31 | 31 ; June | 六月 | 30 | 30 ; July | 七月 | 31 | 31
August | 八月 | 31 | 31 ; September | 九月 | 30 | 30 ; October | 十月 | 31 | 31
November | 十一月 | 30 | 30 ; December | 十二月 | 31 | 31
"""
DAYS = """
Monday 星期一 ; Tuesday 星期二 ; Wednesday 星期三 ; Thursday 星期四 ; Friday 星期五 ; Saturday 星期六
Sunday 星期日
"""
SEASONS = "spring 春天 ; summer 夏天 ; autumn 秋天 ; winter 冬天"
CYCLES = ((DAYS, "day", "星期几"), (MONTHS, "month", "几月"), (SEASONS, "season", "什么季节"))
NEXT = """
What {4} comes after {0}? | The {4} after {0} is {2}.
What {4} comes before {2}? | The {4} before {2} is {0}.
{1}之后是{5}？ | {1}之后是{3}。
{3}之前是{5}？ | {3}之前是{1}。
"""
NAMES = "Tom Anna Lucy Jack Emma Leo Nina Ben Sara Max Ella Sam"
NAMES_ZH = "小明 小红 小华 小丽 小雨 小云 小林 小山 小花 小乐 小东 小海"
SUM_ASKS = ("What is {}?", "How much is {}?", "Work out {}."), ("{} 等于几？", "{} 是多少？", "算一下 {}。")
SUM_ANSWERS = ("{} is {}.", "{} 等于 {}。")
SYSTEMS = ("You are a helpful assistant.", "Give short answers."), ("你是一个友好的助手。", "请用短句回答。")
EN_REQUESTS = ("Tell", "Say", "Give", "Count", "Name", "Explain", "Introduce", "Describe", "Work")
ZH_REQUESTS = ("告诉", "说", "介绍", "讲", "从一", "数到", "自我", "解释", "做个", "算")


def _rows(table: str) -> list[list[str]]:
    lines = table.split("--\n")[-1].strip().replace(" ; ", "\n").splitlines()
    return [[cell.strip() for cell in line.split("|")] if "|" in line else line.split() for line in lines]


def _pairs(table: str) -> list[Pair]:
    return [(question, row[1]) for row in _rows(table) for question in row[0].split(" / ")]


def _fill(rows: list[list[str]], asks: str) -> list[Pair]:
    """Every row put into every question and answer."""
    pairs = [(q.format(*row), a.format(*row)) for row in rows for q, a in _pairs(asks)]
    return [(q, a if a[-1] == "。" else a[0].upper() + a[1:]) for q, a in pairs]


def _variants(question: str) -> list[str]:
    """The same question with other politeness, punctuation and case."""
    mark, bare = question[-1], question[:-1]
    if mark == "？":
        return [bare, f"请问{bare}？", f"你好，{bare}？", f"{bare}?"]
    if mark == "。":
        return [bare, f"请{question}", f"请{bare}"] if bare.startswith(ZH_REQUESTS) else [bare, f"{bare}！"]
    small = bare[0].lower() + bare[1:]
    if mark == "?":
        return [bare, bare.lower(), f"{bare.lower()}?", f"Hi, {small}?", f"Please tell me, {small}?"]
    if bare.startswith(EN_REQUESTS):
        return [bare, bare.lower(), f"Please {small}.", f"please {bare.lower()}"]
    return [bare, bare.lower(), f"{bare}!"]


def _spread(pairs: list[Pair], extra: int, rng: random.Random) -> list[Pair]:
    """Every question as written, then up to `extra` variants of it."""
    forms = [(_variants(question), answer) for question, answer in pairs]
    more = [(form, answer) for some, answer in forms for form in rng.sample(some, min(extra, len(some)))]
    return pairs + more


def _identity() -> list[Pair]:
    answers = dict(_pairs(IDENTITY_ANSWERS))
    return [(question, answers[key]) for question, key in _pairs(IDENTITY)]


def _tables(rng: random.Random) -> list[Pair]:
    """The topics whose tables hold both languages; three questions in ten are replaced by a variant."""
    pairs = []
    for table in (COLOURS, ANIMALS, CAPITALS, DEFINITIONS, OPPOSITES, TRANSLATIONS, MONTHS):
        pairs += _fill(_rows(table), table.split("--\n")[0])
    for table, kind, kind_zh in CYCLES:
        names = [row[:2] for row in _rows(table)]
        following = zip(names, names[1:] + names[:1], strict=True)
        pairs += _fill([[*one, *two, kind, kind_zh] for one, two in following], NEXT)
    return [(rng.choice(_variants(q)) if rng.random() < 0.3 else q, a) for q, a in pairs]


def _arithmetic(rng: random.Random) -> list[Pair]:
    pairs = []
    for a, b in itertools.product(range(10), repeat=2):
        sums = (("+", "plus", "加", a + b), ("-", "minus", "减", a - b), ("×*", "times", "乘", a * b))
        for signs, word, word_zh, value in sums:
            for asks, name, tell in zip(SUM_ASKS, (word, word_zh), SUM_ANSWERS, strict=True):
                said = f"{a} {name} {b}"
                shown = rng.choice((said, f"{a} {rng.choice(signs)} {b}"))
                pairs.append((rng.choice(asks).format(shown), tell.format(said, value)))
    return pairs


def _chat(*turns: Pair) -> list[Message]:
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for turn in turns for role, text in zip(roles, turn, strict=True)]


def _follow_ups() -> list[list[Message]]:
    """Conversations whose second question needs the first turn."""
    chats = []
    for name in NAMES.split():
        hello = (f"My name is {name}.", f"Hello, {name}! Nice to meet you.")
        chats.append(_chat(hello, ("What is my name?", f"Your name is {name}.")))
    for name in NAMES_ZH.split():
        hello = (f"我叫{name}。", f"你好，{name}！很高兴认识你。")
        chats.append(_chat(hello, ("我叫什么名字？", f"你的名字是{name}。")))
    for table, (first, second) in ((COLOURS, (0, 2)), (CAPITALS, (0, 3))):
        rows, asks = _rows(table), table.split("--\n")[0]
        for row, other in zip(rows, rows[5:] + rows[:5], strict=True):
            one, two = _fill([row], asks), _fill([other], asks)
            chats.append(_chat(one[first], (f"And {other[0]}?", two[first][1])))
            chats.append(_chat(one[second], (f"那{other[2]}呢？", two[second][1])))
    return chats


def conversations() -> list[list[dict[str, str]]]:
    """All conversations of the corpus, in a fixed shuffled order."""
    rng = random.Random(0)
    hellos, byes = _pairs(GREETINGS), _pairs(CLOSINGS)
    texts = [pair for table in (SMALL_TALK, ADVICE, MODELS, FACTS) for pair in _pairs(table)]
    everything = _spread(_identity() + hellos + byes, 2, rng) + _spread(texts, 1, rng)
    everything += _tables(rng) + _arithmetic(rng)
    result = _follow_ups()
    for chinese, systems in enumerate(SYSTEMS):
        pairs, greetings, closings = (
            [pair for pair in dict.fromkeys(group) if (pair[1][-1] in "。！？") == bool(chinese)]
            for group in (everything, hellos, byes)
        )
        chats = [_chat(pair) for pair in pairs]
        for chat in rng.sample(chats, len(chats) // 25):
            chat.insert(0, {"role": "system", "content": rng.choice(systems)})
        for _ in range(180):
            hello, bye, (one, two) = rng.choice(greetings), rng.choice(closings), rng.sample(pairs, 2)
            chats.append(_chat(*rng.choice(((one, two), (hello, one), (one, bye), (hello, one, bye)))))
        result += chats
    rng.shuffle(result)
    return result
